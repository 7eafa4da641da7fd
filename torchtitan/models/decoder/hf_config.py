"""Reading and writing of `config.json`, shared by the families: every key that is read is
understood, or refused by name."""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from torchtitan.ops.block_fp8 import BLOCK
from torchtitan.ops.mxfp4 import is_mxfp4
from torchtitan.tools.errors import UserError

# Keys that change what a model computes, of other architectures or as options of ours, with the
# values under which they change nothing. Absent, null, false and empty change nothing either.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "hidden_activation": ("silu",),
    "activation_function": ("silu",),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "attention_out_bias": (False,),
    "qkv_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "bias": (False,),
    "lm_head_bias": (False,),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "original_max_position_embeddings": (),
    "position_embedding_type": ("rope",),
    "alibi": (False,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attn_logit_softcap": (0,),
    "final_logit_softcap": (0,),
    "logits_soft_cap": (0,),
    "router_logit_softcapping": (0,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "lm_head_multiplier": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "attn_scale": (),
    "clip_qkv": (),
    "swiglu_limit": (),
    "use_sliding_window": (False,),
    "sliding_window_pattern": (),
    "attention_chunk_size": (),
    "attn_temperature_tuning": (),
    "add_swa_attention_sink_bias": (),
    "add_full_attention_sink_bias": (),
    "no_rope_layers": (),
    "no_rope_layer_interval": (),
    "index_topk": (),
    "index_n_heads": (),
    "index_head_dim": (),
    "expert_capacity": (),
    "moe_capacity_factor": (),
    "num_experts_per_group": (),
    "zero_expert_num": (),
    "zero_expert_type": (),
    "shared_expert_intermediate_size": (0,),
    "per_layer_config": (),
}
# Keys that don't change what a trained model computes: names, ids of tokens, training, text
# generation, bookkeeping.
HARMLESS = frozenset(
    "architectures model_type auto_map torch_dtype dtype transformers_version _name_or_path "
    "name_or_path _commit_hash tokenizer_class model_max_length seq_length unsloth_version "
    "unsloth_fixed attn_implementation _attn_implementation _attn_implementation_autoset "
    "_experts_implementation use_cache bos_token_id eos_token_id pad_token_id unk_token_id "
    "sep_token_id cls_token_id mask_token_id decoder_start_token_id initializer_range "
    "attention_dropout hidden_dropout resid_pdrop embd_pdrop dropout aux_loss_alpha seq_aux "
    "router_aux_loss_coef router_z_loss_coef output_router_logits router_jitter_noise "
    "pretraining_tp ep_size num_nextn_predict_layers num_mtp_layers max_window_layers return_dict "
    "output_attentions output_hidden_states torchscript use_bfloat16 pruned_heads "
    "chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention "
    "cross_attention_hidden_size tie_encoder_decoder id2label label2id num_labels finetuning_task "
    "task_specific_params problem_type prefix gradient_checkpointing max_length min_length "
    "max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p min_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens tf_legacy_loss language license".split()
)
_REQUIRED = object()
# Beyond all sizes of models; float() and lists as long as a layer count fail far above.
_LARGEST = 2**53


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def expect(key: str, value: Any, *allowed: Any) -> None:
    """Raise `UserError` where `config.json` has a value that the family does not support.

    allowed: supported values; None = the key may be missing.
    """
    if value not in allowed:
        known = " or ".join(repr(each) for each in allowed if each is not None)
        raise UserError(
            f"config.json has {key} = {value!r}, but this architecture is supported only with "
            f"{known}; its weights would compute something else here."
        )


def refuse_export(argument: str, value: Any, family: str, needed: str) -> NoReturn:
    """Raise `UserError` for a model that Hugging Face has no class for.

    argument: of model.args.
    needed: value that the Hugging Face class has.
    """
    raise UserError(
        f"no Hugging Face class computes this model: with model.args.{argument} = {value!r} it is "
        f"not a {family}, which has {needed}; train with that, or keep the checkpoint in our own "
        "format (checkpoint.last_save_in_hf = false)."
    )


class ConfigReader:
    """A table of `config.json` that tracks which of its keys were read.

    null counts as a missing key. A missing key without default raises KeyError, a value of another
    type `UserError`.

    within: the table's name and a dot, for messages.
    """

    def __init__(self, table: Mapping[str, Any], within: str = "") -> None:
        self._table = table
        self._within = within
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._table

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        value = self._table.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        value = self._value(key, default)
        if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST:
            return int(value)
        is_integer = type(value) is int and abs(value) <= _LARGEST
        return self._of_kind(key, value, is_integer or value is default, "an integer")

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self._value(key, default)
        is_number = type(value) is float and math.isfinite(value)
        is_number |= type(value) is int and abs(value) <= _LARGEST
        self._of_kind(key, value, is_number or value is default, "a finite number")
        return float(value) if is_number else value

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self._value(key, default)
        return self._of_kind(key, value, type(value) is bool or value is default, "true or false")

    def table(self, key: str) -> "ConfigReader":
        """Return a nested table, empty where it is missing."""
        value = self.get(key, {})
        self._of_kind(key, value, isinstance(value, Mapping), "a table")
        return ConfigReader(value, f"{self._within}{key}.")

    def only(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """Return the value, which must be one of `allowed`, or `default` where it is missing."""
        value = self.get(key, default)
        if value is not default:
            expect(self._within + key, value, *allowed)
        return value

    def plain(self) -> dict[str, Any]:
        """Return the table without nulls."""
        return {key: value for key, value in self._table.items() if value is not None}

    def refuse_other_models(self) -> None:
        """Raise `UserError` for the first of `NEUTRAL` that was not read and would change what the
        model computes."""
        for key, neutral in NEUTRAL.items():
            value = self._table.get(key)
            if key in self._read or _is_nothing(value):
                continue
            if neutral:
                expect(self._within + key, value, *neutral)
            else:
                self._refuse(key, value)

    def refuse_unread(self) -> None:
        """Raise `UserError` for the first key with a value that was not read."""
        for key, value in self.plain().items():
            if key not in self._read:
                self._refuse(key, value)

    def unread(self) -> list[str]:
        """List keys with a value that are unknown here."""
        known = self._read | NEUTRAL.keys() | HARMLESS
        return [k for k, v in self._table.items() if k not in known and not _is_nothing(v)]

    def _refuse(self, key: str, value: Any) -> NoReturn:
        raise UserError(
            f"config.json has {self._within}{key} = {value!r}, which is not supported here; the "
            "weights would compute something else without it."
        )

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is _REQUIRED:
            if key in self._table:
                self._of_kind(key, None, False, "a value")
            raise KeyError(self._within + key)
        return value

    def _of_kind(self, key: str, value: Any, is_right: bool, kind: str) -> Any:
        if not is_right:
            raise UserError(
                f"config.json has a value of the wrong type: {self._within}{key} = "
                f"{repr(value)[:80]} must be {kind}; download it again."
            )
        return value


def rope_settings(
    config: ConfigReader, default_theta: float | None, *kinds: str
) -> tuple[str, float, ConfigReader]:
    """Read RoPE's settings: kind of scaling ("default": none), base, and the scaling's numbers.

    transformers 5 writes `rope_parameters`, all others `rope_scaling` beside `rope_theta`. Raises
    `UserError` for unknown kinds, and where the two tables, or two names for one value, contradict
    each other.

    default_theta: None where readers of a config without the base use different ones.
    kinds: those that the family supports beside "default".
    """
    tables = {key: config.table(key) for key in ("rope_parameters", "rope_scaling")}
    contents = [_scaling(table) for table in tables.values() if _scaling(table)]
    if len(contents) > 1 and contents[0] != contents[1]:
        raise UserError(
            f"config.json has rope_parameters {contents[0]} and rope_scaling {contents[1]}, and "
            "each reader uses only one of them; remove the wrong one."
        )
    name = next((key for key, table in tables.items() if _scaling(table)), "rope_parameters")
    bases = {"rope_theta": config.number("rope_theta", None)}
    bases |= {f"{key}.rope_theta": t.number("rope_theta", None) for key, t in tables.items()}
    bases = {key: value for key, value in bases.items() if value is not None}
    if len(set(bases.values())) > 1:
        said = " and ".join(f"{key} = {value:g}" for key, value in bases.items())
        raise UserError(f"config.json has {said}; remove the wrong one.")
    theta = next(iter(bases.values()), default_theta)
    if theta is None:
        raise KeyError("rope_theta")
    scaling = tables[name]
    kind = scaling.only("rope_type", "default", *kinds)
    kind = kind or scaling.only("type", "default", *kinds, default="default")
    scaling.only("type", kind)
    scaling.only("partial_rotary_factor", 1)
    if kind == "default":
        scaling.refuse_unread()
    return kind, theta, scaling


def _scaling(table: ConfigReader) -> dict[str, Any]:
    """Content of a table without the base, its kind under the newer name."""
    content = table.plain()
    content.pop("rope_theta", None)
    if "type" in content:
        content.setdefault("rope_type", content["type"])
        if content["type"] == content["rope_type"]:
            content.pop("type")
    return {} if content == {"rope_type": "default"} else content


def check_quantization(config: ConfigReader) -> None:
    """Raise `UserError` for quantised weights of another form than DeepSeek's block-wise FP8 and
    MXFP4."""
    if not config.get("quantization_config"):
        return
    settings = config.table("quantization_config")
    if is_mxfp4(settings.plain()):
        return
    expect("quantization_config.quant_method", settings.get("quant_method"), "fp8")
    settings.only("fmt", "e4m3")
    blocks = settings.get("weight_block_size")
    expect("quantization_config.weight_block_size", blocks, [BLOCK, BLOCK])


def check_layer_types(config: ConfigReader, n_layers: int, n_dense: int) -> None:
    """Raise `UserError` for lists by layer that describe other layers than the model's."""
    same = {"layer_types": {"full_attention": n_layers}}
    same["mlp_layer_types"] = {"dense": n_dense, "sparse": n_layers - n_dense}
    for key, counts in same.items():
        given = config.get(key)
        longest = len(given) if isinstance(given, list) else 0  # a count may be absurd
        kinds = [[kind] * min(count, longest + 1) for kind, count in counts.items()]
        config.only(key, sum(kinds, []))


def check_aliases(config: ConfigReader, value: int, *names: str) -> None:
    """Raise `UserError` where another name of the same setting has another value."""
    for name in names:
        config.only(name, value)
