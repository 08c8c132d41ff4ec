"""fastrnn beside torch.nn and others: the same inputs, one process, interleaved, behind a parity gate.

`fastrnn bench` and `fastrnn verify` are the ways in; nothing here is imported by `import fastrnn`.
"""
