"""fastrnn beside torch.nn: the same inputs, one process, interleaved, behind a parity gate."""
