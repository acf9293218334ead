"""What the benchmarks share.

=============  ========================================================================================================
`timing`       `Times` (median, quartiles) of repeated calls, of one rank or of the slowest one; stages; peak memory
`teams`        groups of 1, 2, 4, ... ranks inside one job
`records`      device, versions and commit; a JSON file that is written after every case
`options`      lists of numbers and pairs on the command line
`inputs`       random q, k, v and dout, with uniform or correlated routing
`checks`       errors of the tensors that were timed, against the definition for sampled rows and blocks
`definition`   the definition in fp64 for sampled rows over any number of ranks; fingerprints of tensors
`sweep`        the YAML files of `scripts.scaling`, checked and expanded into cases
`layer_case`   one case of `scripts.scaling`: the layer; `dense_case`: dense attention beside it
`chunk`        one routed chunk of heads, for `scripts.tune`
`training`     starts a program of examples/megatron_gpt and reads what it logged
=============  ========================================================================================================

Everything works on the CPU too, so that tests can run the benchmarks with small sizes.
"""
