"""Our server compared with other model servers, each in an environment of its own.

python -m benchmarks.peers setup
python -m benchmarks.peers run models/digits --precision fp32,int8
"""
