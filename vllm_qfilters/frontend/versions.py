"""The versions of vLLM that are supported, and what is done differently with one of them.

Names and parameters that differ are in tests/seams.py.
"""

VLLM_VERSIONS = ((0, 32), (0, 33))

Version = tuple[int | str, ...]  # vllm.__version_tuple__; zeros at its head: a build that does not know its version


def check_version(version: Version) -> None:
    """Refuses a vLLM that nobody has looked into. One that does not know its version passes.

    Raises:
        ValueError: says which to install.
    """
    release = version[:2]
    if release not in (*VLLM_VERSIONS, (0, 0)):
        (_, oldest), (_, newest) = VLLM_VERSIONS[0], VLLM_VERSIONS[-1]
        raise ValueError(
            f"KV compression works with vLLM 0.{oldest} to 0.{newest}, this is {'.'.join(map(str, release))}: pip "
            f"install 'vllm>=0.{oldest},<0.{newest + 1}', or start without --kv-compression"
        )


def base_model_gets_last_adapter(version: Version) -> bool:
    """Whether vLLM's operators on CPUs answer the base model with the adapter in the last slot: rows without an adapter
    carry -1, which those of 0.32 use as an index."""
    return version[:2] == (0, 32)


def set_up_environment() -> None:
    """Sets what vLLM's own command line sets before it starts an engine."""
    try:
        from vllm.entrypoints.common.startup import cli_env_setup  # type: ignore[import-not-found, unused-ignore]
    except ImportError:  # 0.32
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup  # type: ignore[attr-defined, unused-ignore]
    cli_env_setup()
