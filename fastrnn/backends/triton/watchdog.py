"""The watchdog of the persistent Triton kernels."""

from fastrnn.backends.watchdog import Watchdog

LIMIT = 1 << 22  # looks at a counter, each of which takes more than half a microsecond: seconds, where a step takes few

_watchdog = Watchdog("Triton", "programs", "fastrnn.backend('native')", "FASTRNN_TRITON_SCHEDULE=stepwise")
_flags, flag, check = _watchdog.flags, _watchdog.flag, _watchdog.check
