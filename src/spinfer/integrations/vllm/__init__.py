"""vLLM: the plugin's entry point.

`config` says which layers are sparse, `shares` what of each a rank holds; `linear` loads and runs them.
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM know compressed checkpoints; it calls this in every process, more than once in some."""
    from spinfer.integrations.vllm.config import register_config

    register_config()
