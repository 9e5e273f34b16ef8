"""Measurements that are made once in a while: exports, GPUs, overload, MLPerf."""
