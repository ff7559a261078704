"""Entry point ``vllm.general_plugins``: vLLM calls :func:`register` in each of its processes, sometimes twice."""


def register() -> None:
    """Teaches vLLM the ``--kv-compression`` flag. An engine started without it runs as if this package were not
    installed.
    """
    from vllm_qfilters.frontend.compat import apply_patches

    apply_patches()
