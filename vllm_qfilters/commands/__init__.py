from vllm_qfilters.commands.cli import main as main
