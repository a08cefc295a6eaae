"""Every key of every script with its type, default and meaning, as a page in Markdown:  python launch/keys.py"""

from __future__ import annotations

from typing import Any

from qwen2audio_train.config.ablation import AblationConfig
from qwen2audio_train.config.chat import ChatConfig
from qwen2audio_train.config.finetune import FinetuneConfig
from qwen2audio_train.config.keys import keys_of
from qwen2audio_train.config.recipe import RecipeConfig
from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.config.tools import EvaluateConfig, ExportConfig
from qwen2audio_train.data.tools.chat import ChatOptions
from qwen2audio_train.data.tools.check import CheckOptions
from qwen2audio_train.data.tools.convert import ConvertOptions
from qwen2audio_train.data.tools.quiet import QuietOptions
from qwen2audio_train.data.tools.shards import ShardOptions
from qwen2audio_train.data.tools.show import ShowOptions
from qwen2audio_train.data.tools.stats import IndexOptions, VisualizeOptions
from qwen2audio_train.evaluation.backends.api import ApiOptions
from qwen2audio_train.evaluation.backends.transformers import TransformersOptions
from qwen2audio_train.evaluation.backends.vllm import VllmOptions
from qwen2audio_train.evaluation.judging.judge import JudgeOptions
from qwen2audio_train.evaluation.reporting.compare import CompareOptions
from qwen2audio_train.evaluation.reporting.write import ReportOptions
from qwen2audio_train.pairs.hearing import HearingOptions
from qwen2audio_train.pairs.make import RuleOptions, SamplingOptions
from qwen2audio_train.parts.fetch import PartsOptions
from qwen2audio_train.planning.forecast import PlanOptions
from qwen2audio_train.training.checkpoints.average import AverageOptions

SCHEMAS: dict[str, Any] = {
    "pretrain, sft, dpo, grpo, encoder": StageConfig,
    "recipe": RecipeConfig,
    "finetune": FinetuneConfig,
    "ablate": AblationConfig,
    "evaluate": EvaluateConfig,
    "evaluate compare": CompareOptions,
    "evaluate judge": JudgeOptions,
    "evaluate api": ApiOptions,
    "evaluate vllm": VllmOptions,
    "evaluate transformers": TransformersOptions,
    "report": ReportOptions,
    "export": ExportConfig,
    "average": AverageOptions,
    "chat": ChatConfig,
    "data convert": ConvertOptions,
    "data chat": ChatOptions,
    "data quiet": QuietOptions,
    "data check": CheckOptions,
    "data index, data stats": IndexOptions,
    "data shard": ShardOptions,
    "data visualize": VisualizeOptions,
    "data show": ShowOptions,
    "pairs sample": SamplingOptions,
    "pairs rules": RuleOptions,
    "pairs hearing": HearingOptions,
    "plan": PlanOptions,
    "parts": PartsOptions,
}

HEAD = """# Keys

Every key of every script; `launch/NAME.py --help` says the same. This page is made by `make docs-keys`. The defaults
are the schema's: a stage's recipe under recipes/ sets its own, which `python launch/NAME.py --cfg job` prints."""


def page() -> str:
    """The whole page."""
    return "\n\n".join([HEAD, *(table(names, schema) for names, schema in SCHEMAS.items())]) + "\n"


def table(names: str, schema: Any) -> str:
    """The keys of one schema under the names of the scripts that take them."""
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key in keys_of(schema):
        kind, meaning = (text.replace("|", "\\|") for text in (key.type, key.meaning))
        rows.append(f"| `{key.name}` | {kind} | {f'`{key.default}`' if key.default else ''} | {meaning} |")
    return "\n".join([f"## {names}", "", *rows])


if __name__ == "__main__":
    print(page(), end="")
