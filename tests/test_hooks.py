"""The hook layer against `run_with_cache`, on every TransformerLens class."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import EVERY_MODEL, N_HEADS, N_LAYERS, WIDTH, tiny_model, token_ids

from saefeat.activations.hook_names import resolve_hooks
from saefeat.activations.hook_reader import HookReader
from saefeat.activations.hooks import read_activations
from saefeat.activations.replacing import replaced_activations

CAUSAL = ["bridge of GPT-2", "bridge of Llama", "bridge of GPT-NeoX", "HookedTransformer"]
PARALLEL = ["bridge of GPT-NeoX", "HookedTransformer, parallel"]
VECTOR_HOOKS = ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "mlp.hook_post"]
VECTOR_HOOKS += ["hook_resid_post"]


@pytest.fixture(params=EVERY_MODEL)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture
def llama() -> Any:
    return tiny_model("bridge of Llama")


def cached(model: Any, ids: torch.Tensor, hooks: list[str], **mask: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, names_filter=list(hooks), **mask)
    return {hook: cache[hook].clone() for hook in hooks}


def attached_functions(model: Any) -> dict[str, list[Any]]:
    """Every function set on any module of the model, whoever set it."""
    return {
        name: [
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            *getattr(module, "fwd_hooks", []),
        ]
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("part", VECTOR_HOOKS)
def test_equals_run_with_cache_bit_for_bit(model: Any, part: str) -> None:
    hooks = [f"blocks.{layer}.{part}" for layer in range(N_LAYERS)]
    ids = token_ids()
    read = HookReader(model, hooks).read(ids)
    assert list(read) == hooks
    for hook, expected in cached(model, ids, hooks).items():
        assert torch.equal(read[hook], expected)


def test_all_hooks_at_once_equal_run_with_cache(model: Any) -> None:
    hooks = resolve_hooks(model, [f"blocks.*.{part}" for part in reversed(VECTOR_HOOKS)])
    assert len(hooks) == len(VECTOR_HOOKS) * N_LAYERS
    ids = token_ids()
    read = HookReader(model, hooks).read(ids)
    for hook, expected in cached(model, ids, hooks).items():
        assert torch.equal(read[hook], expected)


@pytest.mark.parametrize("part", ["hook_q", "hook_z"])
def test_head_shaped_hooks_are_flattened_on_request_only(model: Any, part: str) -> None:
    hook = f"blocks.1.attn.{part}"
    ids = token_ids()
    with pytest.raises(ValueError, match="flatten_heads=True"):
        HookReader(model, hook).read(ids)
    expected = cached(model, ids, [hook])[hook]
    assert expected.shape == (3, 8, N_HEADS, WIDTH // N_HEADS)
    read = HookReader(model, hook, flatten_heads=True).read(ids)[hook]
    assert torch.equal(read, expected.flatten(2))


def test_model_is_left_as_it_was_found(model: Any) -> None:
    ids = token_ids()
    before, logits = attached_functions(model), model(ids)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    reader = HookReader(model, "blocks.*.hook_resid_post")
    reader.read(ids)
    assert attached_functions(model) == before
    assert torch.is_grad_enabled()
    assert torch.equal(model(ids), logits)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert logits.requires_grad
    assert model(ids).requires_grad


def test_model_is_left_as_it_was_found_when_the_forward_raises(model: Any) -> None:
    ids = token_ids()
    before, logits = attached_functions(model), model(ids)
    reader = HookReader(model, "blocks.*.hook_resid_post")
    with pytest.raises(IndexError):
        reader.read(ids + 1000)
    with pytest.raises(ValueError, match="head axis"):
        HookReader(model, ["blocks.2.hook_resid_post", "blocks.1.attn.hook_q"]).read(ids)
    assert attached_functions(model) == before
    assert torch.is_grad_enabled()
    assert torch.equal(model(ids), logits)


def test_nothing_runs_beyond_the_deepest_hook(model: Any) -> None:
    later = ["blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre"]
    later += [name for name in model.hook_dict if name.startswith(("unembed", "ln_final"))]
    fired: list[str] = []
    for name in later:
        model.hook_dict[name].add_hook(lambda value, hook: fired.append(hook.name))
    HookReader(model, ["blocks.1.hook_attn_out", "blocks.0.hook_mlp_out"]).read(token_ids())
    assert fired == []


def test_the_unembedding_never_runs(llama: Any) -> None:
    ran: list[bool] = []
    unembedding = llama.original_model.get_output_embeddings()
    unembedding.register_forward_hook(lambda *_: ran.append(True))
    HookReader(llama, "blocks.*.hook_resid_post").read(token_ids())
    assert not ran
    llama(token_ids())
    assert ran


def test_buffers_are_reused_and_can_be_trained_on(model: Any) -> None:
    hook = "blocks.1.hook_resid_post"
    reader = HookReader(model, hook)
    with torch.inference_mode():
        first = reader.read(token_ids(4))[hook]
    address, first = first.data_ptr(), first.clone()
    smaller = reader.read(token_ids(2, seed=1))[hook]
    assert smaller.data_ptr() == address
    again = reader.read(token_ids(4))[hook]
    assert again.data_ptr() == address
    assert torch.equal(again, first)
    weight = torch.ones(WIDTH, requires_grad=True)
    (again @ weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_a_shorter_context_gets_a_buffer_that_fits(llama: Any) -> None:
    hook = "blocks.0.hook_resid_post"
    reader = HookReader(llama, hook)
    reader.read(token_ids(4, 8))
    short = token_ids(4, 5)
    assert torch.equal(reader.read(short)[hook], cached(llama, short, [hook])[hook])


def test_hooks_that_the_user_set_stay_and_run(model: Any) -> None:
    point = model.hook_dict["blocks.0.hook_resid_post"]
    seen: list[torch.Size] = []

    def double(value: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(value.shape)
        return value * 2

    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    plain = read_activations(model, token_ids(), hooks)
    point.add_hook(double)
    before = attached_functions(model)
    doubled = read_activations(model, token_ids(), hooks)
    assert attached_functions(model) == before
    assert seen == [torch.Size((3, 8, WIDTH))]
    assert torch.equal(doubled[hooks[0]], plain[hooks[0]] * 2)
    assert not torch.equal(doubled[hooks[1]], plain[hooks[1]])


def test_names_come_back_as_asked_for_each_one_once(model: Any) -> None:
    asked = ["blocks.2.hook_resid_post", "blocks.*.hook_resid_post", "blocks.0.hook_attn_out"]
    names = [
        "blocks.2.hook_resid_post",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
        "blocks.0.hook_attn_out",
    ]
    assert resolve_hooks(model, asked) == names
    assert list(HookReader(model, asked).read(token_ids())) == names


def test_two_names_of_one_hook_point_share_a_buffer(llama: Any) -> None:
    names = ["blocks.0.hook_resid_post", "blocks.0.hook_out"]
    read = HookReader(llama, names).read(token_ids())
    assert list(read) == names
    assert read[names[0]].data_ptr() == read[names[1]].data_ptr()


def test_patterns_sort_layers_by_number() -> None:
    names = {f"blocks.{layer}.hook_resid_post": None for layer in (10, 2, 1, 0, 11)}
    model = SimpleNamespace(hook_dict=names)
    expected = [f"blocks.{layer}.hook_resid_post" for layer in (0, 1, 2, 10, 11)]
    assert resolve_hooks(model, "blocks.*.hook_resid_post") == expected


def test_unknown_hooks_are_an_error_that_lists_near_matches(model: Any) -> None:
    with pytest.raises(ValueError, match=r"blocks.0.hook_resid_postt.*blocks\.0\.hook_resid_post"):
        HookReader(model, ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_postt"])
    with pytest.raises(ValueError, match="Near matches"):
        HookReader(model, "blocks.*.hook_residpost")
    with pytest.raises(ValueError, match="No hook was asked for"):
        HookReader(model, [])


@pytest.mark.parametrize("kind", PARALLEL)
def test_parallel_blocks_have_no_middle_and_say_so(kind: str) -> None:
    with pytest.raises(ValueError, match="parallel"):
        HookReader(tiny_model(kind), "blocks.*.hook_resid_mid")


@pytest.mark.parametrize("hook", ["blocks.0.attn.hook_pattern", "embed.hook_in"])
def test_hooks_without_a_vector_for_each_position_are_refused(llama: Any, hook: str) -> None:
    # As many heads as positions: only the name tells a pattern from a head-shaped hook.
    with pytest.raises(ValueError, match="not one vector"):
        HookReader(llama, hook, flatten_heads=True).read(token_ids(N_HEADS, N_HEADS))


def test_a_hook_that_is_switched_off_is_named(llama: Any) -> None:
    before = attached_functions(llama)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.hook_result did not run"):
        HookReader(llama, ["blocks.0.hook_out", "blocks.1.attn.hook_result"]).read(token_ids())
    assert attached_functions(llama) == before


def test_dropout_that_is_switched_on_is_refused() -> None:
    model = tiny_model("bridge of GPT-2")
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        HookReader(model, "blocks.0.hook_resid_post")


@pytest.mark.parametrize("kind", CAUSAL)
def test_left_padded_contexts_read_as_if_unpadded(kind: str) -> None:
    model, ids = tiny_model(kind), token_ids(2, 6)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = torch.arange(9).expand(2, 9) >= 3
    hooks = "blocks.*.hook_resid_post"
    plain = read_activations(model, ids, hooks)
    for hook, rows in read_activations(model, padded, hooks, attention_mask=mask).items():
        assert rows.shape == (12, WIDTH)
        torch.testing.assert_close(rows, plain[hook], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bridge of BERT", "HookedEncoder"])
def test_right_padded_contexts_of_encoders_read_as_if_unpadded(kind: str) -> None:
    model, ids = tiny_model(kind), token_ids(2, 6)
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = torch.arange(9).expand(2, 9) < 6
    plain = read_activations(model, ids, "blocks.*.hook_resid_post")
    masked = read_activations(model, padded, "blocks.*.hook_resid_post", attention_mask=mask)
    unmasked = read_activations(model, padded, "blocks.*.hook_resid_post")
    for hook, rows in masked.items():
        torch.testing.assert_close(rows, plain[hook], rtol=1e-4, atol=1e-5)
        without = unmasked[hook].view(2, 9, WIDTH)[:, :6].reshape(12, WIDTH)
        assert not torch.allclose(without, plain[hook], rtol=1e-4, atol=1e-5)


def test_rows_are_the_counted_positions_in_order_whatever_the_batch_size(llama: Any) -> None:
    ids = token_ids(5, 8)
    mask = torch.rand(5, 8, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[:, 0] = True
    hook = "blocks.1.hook_mlp_out"
    values = HookReader(llama, hook).read(ids, mask)[hook].clone()
    for batch_size in (1, 2, 5, 32):
        rows = read_activations(llama, ids, hook, attention_mask=mask, batch_size=batch_size)
        torch.testing.assert_close(rows[hook], values[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (1, 5), (5,)])
def test_a_mask_of_another_shape_than_the_tokens_is_refused(
    llama: Any, shape: tuple[int, ...]
) -> None:
    ids, mask = token_ids(2, 5), torch.ones(shape)
    # The annotations, which nobody but the tests checks, would refuse it too.
    read = inspect.unwrap(read_activations)
    with pytest.raises(ValueError, match=r"attention_mask has shape .* and token_ids \[2, 5\]"):
        read(llama, ids, "blocks.0.hook_resid_pre", attention_mask=mask)


def test_one_context_may_be_given_without_a_batch_axis(llama: Any) -> None:
    hook, ids = "blocks.1.hook_resid_pre", token_ids(1)
    assert torch.equal(
        read_activations(llama, ids[0], hook)[hook], read_activations(llama, ids, hook)[hook]
    )


def test_values_come_in_the_dtype_of_the_model(llama: Any) -> None:
    model = llama.to(torch.bfloat16)
    assert read_activations(model, token_ids(), "blocks.0.hook_out")["blocks.0.hook_out"].dtype == (
        torch.bfloat16
    )


def test_replacing_by_the_same_changes_nothing_and_by_zero_equals_run_with_hooks(
    model: Any,
) -> None:
    hook, ids = "blocks.1.hook_resid_post", token_ids()
    before, logits = attached_functions(model), model(ids)
    with replaced_activations(model, hook, lambda x, _: x.clone()):
        assert torch.equal(model(ids), logits)
    with replaced_activations(model, hook, lambda x, _: torch.zeros_like(x)):
        zeroed = model(ids)
    expected = model.run_with_hooks(ids, fwd_hooks=[(hook, lambda x, hook: torch.zeros_like(x))])
    assert torch.equal(zeroed, expected)
    assert not torch.equal(zeroed, logits)
    assert attached_functions(model) == before
    assert torch.equal(model(ids), logits)


def test_heads_are_flattened_for_the_replacement_and_put_back(model: Any) -> None:
    hook, ids = "blocks.1.attn.hook_z", token_ids()
    logits = model(ids)
    shapes: list[torch.Size] = []

    def same(value: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        shapes.append(value.shape)
        assert torch.equal(source, value)
        return value.clone()

    with replaced_activations(model, hook, same):
        assert torch.equal(model(ids), logits)
    assert shapes == [torch.Size((3, 8, WIDTH))]


def test_a_replacement_can_be_made_of_an_earlier_hook(model: Any) -> None:
    ids, earlier, later = token_ids(), "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"
    rows = read_activations(model, ids, hooks=[earlier])[earlier].view(3, 8, WIDTH)

    def check(value: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        assert torch.equal(source, rows)
        return source

    with replaced_activations(model, later, check, source=earlier):
        spliced = model(ids)
    expected = model.run_with_hooks(ids, fwd_hooks=[(later, lambda x, hook: rows)])
    assert torch.equal(spliced, expected)
    with (
        pytest.raises(ValueError, match="not reached before"),
        replaced_activations(model, earlier, check, source=later),
    ):
        model(ids)


def test_a_replacement_of_another_shape_is_refused_and_leaves_no_hook(llama: Any) -> None:
    before = attached_functions(llama)
    with (
        pytest.raises(ValueError, match="has shape"),
        replaced_activations(llama, "blocks.1.hook_out", lambda x, _: x[..., :3]),
    ):
        llama(token_ids())
    with (
        pytest.raises(ValueError, match="3 hooks"),
        replaced_activations(llama, "blocks.*.hook_resid_post", lambda x, _: x),
    ):
        pass
    assert attached_functions(llama) == before
