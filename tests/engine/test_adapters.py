"""Adapters by row: beside others a request with one says what the model with it alone says, and the cache tells them apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import refused
from lora_folders import folded, write_adapter
from tiny import FAMILIES, MASK, prompt_of, request_of, tiny_model
from unmask.engine.adapted import adapted_model
from unmask.engine.engine import Engine
from unmask.engine.llm import LanguageModel
from unmask.engine.request import Request
from unmask.engine.sampling_params import ResolvedParams
from unmask.errors import ConfigError
from unmask.models.arch.gated_lora import add_gated_lora, parent_config
from unmask.models.arch.transformer import Transformer, reconfigured
from unmask.models.weights.lora_adapter import LoraAdapter, read_lora_adapter

SHIFTED = {"mask_id": MASK, "start_id": 1, "block_size": 4}


def two_adapters(model: Transformer, folder: Path) -> dict[str, LoraAdapter]:
    """Two adapters of a model, in folders of their names."""
    return {
        name: read_lora_adapter(write_adapter(model, folder / name, seed=seed), model.config, name=name)
        for seed, name in enumerate("ab", 1)
    }


def mixed(requests: list[Request], adapters: dict[str, LoraAdapter]) -> list[Request]:
    """Each request without an adapter and with each of them, in turn."""
    return [replace(each, adapter=adapter) for each in requests for adapter in (None, *adapters.values())]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask_id", [None, MASK], ids=["autoregressive", "diffusion"])
def test_a_mixed_batch_says_what_each_model_says_alone(family: str, mask_id: int | None, tmp_path: Path) -> None:
    model = tiny_model(family, 1, torch.float64)
    adapters = two_adapters(model, tmp_path)
    requests = [request_of(9, 12), request_of(14, 8, start=3)]
    alone = [
        Engine(each, mask_id=mask_id, cache_block_size=4).run(requests)
        for each in (model, *(folded(model, tmp_path / name) for name in adapters))
    ]
    assert len({answer.ids for answers in alone for answer in answers}) == 6
    together = Engine(model, mask_id=mask_id, cache_block_size=4).run(mixed(requests, adapters))
    assert [each.ids for each in together] == [alone[k][i].ids for i in range(2) for k in range(3)]


def test_rows_of_the_base_are_the_same_bits(tmp_path: Path) -> None:
    model = tiny_model("qwen3", 1)
    adapters = two_adapters(model, tmp_path)
    wanted = replace(request_of(9, 8), params=ResolvedParams(block_size=4, max_new_tokens=8, logprobs=3))
    (alone,) = Engine(model, mask_id=MASK).run([wanted])
    beside = Engine(model, mask_id=MASK).run([wanted, replace(wanted, adapter=adapters["a"])])
    assert beside[0].ids == alone.ids
    assert beside[0].logprobs != beside[1].logprobs
    same_shapes = Engine(model, mask_id=MASK).run([wanted, replace(wanted, ids=tuple(reversed(wanted.ids)))])
    assert beside[0].logprobs == same_shapes[0].logprobs


def test_no_prefix_is_shared_across_adapters(tmp_path: Path) -> None:
    model = tiny_model("llama", 1, torch.float64)
    adapters = two_adapters(model, tmp_path)
    engine = Engine(model, mask_id=MASK, cache_block_size=4)
    requests = mixed([request_of(14, 4)], adapters)
    assert [engine.run([each])[0].costs.cached_tokens for each in requests] == [0, 0, 0]
    assert [engine.run([each])[0].costs.cached_tokens for each in requests] == [12, 12, 12]
    again = read_lora_adapter(tmp_path / "a", model.config, name="other")
    assert engine.run([replace(requests[0], adapter=again)])[0].costs.cached_tokens == 12  # the same files


def test_a_self_speculative_model_says_what_its_parent_with_the_adapter_says(tmp_path: Path) -> None:
    child = add_gated_lora(tiny_model("llama", 1, torch.float64, **SHIFTED), 4, seed=0)
    with torch.no_grad():
        for name, parameter in child.named_parameters():
            if name.endswith("gated_out"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    parent = reconfigured(child, parent_config(child.config)).eval()
    write_adapter(parent, tmp_path / "a", seed=1)
    adapters = {"a": read_lora_adapter(tmp_path / "a", child.config, name="a")}
    prompt = (1, 5, 9, 5, 9, 5)
    fast = Request(
        prompt, ResolvedParams(block_size=4, max_new_tokens=16, threshold=0.1, mode="speculative", prompt_lookup=True)
    )
    base, adapted = Engine(child.eval(), cache_block_size=4).run(mixed([fast], adapters))
    slow = Request((1, *prompt), ResolvedParams(max_new_tokens=16))
    expected = [Engine(each).run([slow])[0].ids for each in (parent, folded(parent, tmp_path / "a"))]
    assert [base.ids, adapted.ids] == expected
    assert expected[0] != expected[1]


def test_samples_of_one_prompt_draw_as_alone(tmp_path: Path) -> None:
    model = LanguageModel(tiny_model("llama", 1, torch.float64, mask_id=MASK, block_size=4), None, name="base")
    write_adapter(model.transformer, tmp_path / "a")
    adapted = adapted_model(model, tmp_path / "a", name="a")
    assert adapted.name == "base:a"
    ids, options = prompt_of(7, 8).ids, {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    requests = [each.request(ids, **options) for each in (model, adapted)]
    answers = adapted.engine().run(requests)
    assert answers[1].ids == folded_ids(model, tmp_path / "a", ids, **options)
    assert answers[0].ids == tuple(model.generate_ids(ids, **options))
    assert answers[1].ids == tuple(adapted.generate_ids(ids, **options))
    with refused(ConfigError, "base:a"):
        adapted_model(adapted, tmp_path / "a", name="b")


def folded_ids(model: LanguageModel, folder: Path, ids: tuple[int | None, ...], **options: int | float) -> tuple[int, ...]:
    """The answer of the model with the adapter alone."""
    return tuple(LanguageModel(folded(model.transformer, folder), None, name="alone").generate_ids(ids, **options))


def test_an_adapter_of_another_model_is_refused_before_any_forward(tmp_path: Path) -> None:
    other = tiny_model("llama", 1, hidden_size=16)
    adapter = read_lora_adapter(write_adapter(other, tmp_path / "a"), other.config, name="a")
    with refused(ConfigError, "adapter a", 16):
        Engine(tiny_model("llama", 1)).runner.backend.prepare_adapter(adapter)
