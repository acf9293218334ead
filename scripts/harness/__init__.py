"""What the benchmarks share.

=============  ========================================================================================================
`timing`       `Times` (median, quartiles) of repeated calls, of one rank or of the slowest one; stages; peak memory
`records`      device, versions and commit; a JSON file that is written after every case
`options`      lists of numbers and pairs on the command line
`inputs`       random q, k, v and dout, with uniform or correlated routing
`checks`       errors of the tensors that were timed, against the definition for sampled rows and blocks
`training`     starts a program of examples/megatron_gpt and reads what it logged
=============  ========================================================================================================

Everything works on the CPU too, so that tests can run the benchmarks with small sizes.
"""
