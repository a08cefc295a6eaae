"""The recipe of a sample: from the config, into a checkpoint and out of it, and overridden by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qwen2audio_train.config.bounds import nearest
from qwen2audio_train.config.data import DataConfig, SampleRecipe
from qwen2audio_train.config.schema import ConfigError, load_config
from qwen2audio_train.data.audio.files import AudioLimits
from qwen2audio_train.data.examples import Example
from qwen2audio_train.data.prompts.pools import PromptTemplate
from qwen2audio_train.data.prompts.render import Rendered, render
from qwen2audio_train.data.prompts.tokenizer import save_processor
from qwen2audio_train.data.storage.remote import Remote
from qwen2audio_train.families.known import DEFAULT, family_of

FILE = "sample_recipe.json"
"""Its place among the files of a model's weights."""

MODEL_KEYS = ("family", "num_mel_bins")
"""What the model decides."""

KEYS = tuple(field.name for field in dataclasses.fields(SampleRecipe) if field.name not in MODEL_KEYS)
"""What `data:` decides, and what a command may override."""


def recipe_of(data: DataConfig, num_mel_bins: int, family: str = DEFAULT.name) -> SampleRecipe:
    """How the config wants examples to become samples of a model with so many mel bins."""
    return SampleRecipe(**{key: getattr(data, key) for key in KEYS}, num_mel_bins=num_mel_bins, family=family)


def remote_of(keys: DataConfig | SampleRecipe) -> Remote:
    """How remote files are to be read."""
    return Remote(keys.cache_dir, keys.cache_max_gib, keys.network_retries, keys.network_timeout_s)


def limits_of(keys: DataConfig | SampleRecipe) -> AudioLimits:
    """What is decoded at most, and for how long."""
    return AudioLimits(timeout_s=keys.decode_timeout_s)


def render_as(
    recipe: SampleRecipe, example: Example, *, for_generation: bool = False, template: PromptTemplate | None = None
) -> Rendered:
    """`render` in the recipe's style."""
    return render(
        example,
        prompt_style=recipe.prompt_style,
        seed=recipe.prompt_seed,
        prompts_per_task=recipe.prompts_per_task,
        labelled_turns=recipe.labelled_turns,
        timestamps=recipe.timestamps,
        for_generation=for_generation,
        family=family_of(recipe.family),
        template=template,
    )


def overridden(recipe: SampleRecipe, given: Mapping[str, Any]) -> SampleRecipe:
    """The recipe with some of its fields replaced, under the types and bounds that they have in `data:`.

    Raises:
        ConfigError: naming `sample.<field>`: there is no such field, or it does not take this value.
    """
    for key in given:
        if key not in KEYS:
            raise ConfigError(f"sample.{key}: unknown key; {nearest(key, KEYS, 'sample.')}")
    values = {key: value for key, value in plain(recipe).items() if key in KEYS}
    try:
        data = load_config(values | dict(given), DataConfig)
    except ConfigError as error:
        raise ConfigError(f"sample.{error}") from error
    return recipe_of(data, recipe.num_mel_bins, recipe.family)


def plain(recipe: SampleRecipe) -> dict[str, Any]:
    """The fields as JSON has them."""
    return {key: x.value if isinstance(x, Enum) else x for key, x in dataclasses.asdict(recipe).items()}


def save_inputs(tokenizer: PreTrainedTokenizerBase, recipe: SampleRecipe, folder: str | Path) -> None:
    """Write beside a model's weights how its inputs are made: the stock processor, and the recipe."""
    save_processor(tokenizer, folder, recipe.num_mel_bins, family_of(recipe.family))
    Path(folder, FILE).write_text(json.dumps(plain(recipe), indent=1) + "\n")


def saved_recipe(folder: str | Path) -> SampleRecipe | None:
    """The recipe that a folder of weights was trained by, None where it names none.

    Raises:
        ConfigError: the file is damaged, or names fields or values that this version does not know.
    """
    path = Path(folder, FILE)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        family = family_of(values.pop("family", DEFAULT.name))  # recipes named none while there was one
        recipe = SampleRecipe(num_mel_bins=int(values.pop("num_mel_bins")), family=family.name)
        return overridden(recipe, values)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path}: no recipe of samples ({error}); delete it to go on with the defaults") from error
