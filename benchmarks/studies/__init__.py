"""Studies, which are run now and then by hand: exports, GPUs, overload, MLPerf."""
