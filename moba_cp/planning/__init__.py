"""Predicts time, bytes and memory of MoBA attention on GPUs that are not at hand, from measurements on some that are.

===============  ======================================================================================================
`sizes`          `Layer`, `Cluster`, `Split`: what is predicted; work of the busiest rank, counted from the definition
`calibration`    coefficients per stage and exchange, fitted to result files; `Calibration.default()` is committed
`prediction`     milliseconds by stage, bytes by link, and how predictions compare with measurements
`memory`         GiB per GPU by part
`advice`         the best split of a cluster, tables, and where one way of exchanging overtakes another
===============  ======================================================================================================

Host arithmetic only: nothing here needs a GPU or a process group. The command line is `moba-cp plan`.
"""
