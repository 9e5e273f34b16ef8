"""Tests of the comparison with other servers; none of them needs one."""
