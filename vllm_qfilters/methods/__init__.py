"""Methods of choosing which tokens stay: one file per method, one entry each in
:mod:`vllm_qfilters.methods.catalog`.
"""
