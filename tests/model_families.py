"""Tiny random models of several families, each with the chat template that TRL ships for it."""

import importlib.util
import re
from pathlib import Path
from typing import Any

_TRL = importlib.util.find_spec("trl")
_TEMPLATES = Path((_TRL and _TRL.origin) or "").parent / "chat_templates"
#: Each chat template of TRL by its name; those for training are changed copies of the others.
TEMPLATES = {path.stem: path for path in sorted(_TEMPLATES.glob("*.jinja")) if not path.stem.endswith("_training")}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_STATES = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8}
_HYBRID = {**_STATES, **_MOE, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32}
#: The config class, the template and further settings of each family.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", "qwen3", {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", "gemma3", {"head_dim": 16, "sliding_window": 32}),
    "llama3": ("LlamaConfig", "llama3_2", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    "mistral": ("MistralConfig", "mistral", {"head_dim": 16, "sliding_window": 32}),
    "phi3": ("Phi3Config", "phi3", {}),
    "gpt_oss": ("GptOssConfig", "gptoss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite_hybrid": ("GraniteMoeHybridConfig", "qwen2_5", _HYBRID),
}
_SHARED = {**_MOE, "n_routed_experts": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
#: Families that are created on the meta device alone: the config class and further settings.
UNTRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_SHARED, **_LATENT, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
    ),
    "glm4_moe": ("Glm4MoeConfig", {**_SHARED, "head_dim": 16}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **_LINEAR,
            "linear_value_head_dim": 16,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "mixtral": ("MixtralConfig", _MOE),
    "falcon_h1": ("FalconH1Config", {**_STATES, "mamba_d_ssm": 128, "head_dim": 16}),
    "mamba": ("MambaConfig", {}),
}
#: Mistral 7B Instruct's, which TRL does not ship.
_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def set_template(tokenizer: Any, name: str) -> Any:
    """Give the tokenizer a template and the tokens that occur in it, special but for those of thoughts."""
    text = _MISTRAL if name == "mistral" else TEMPLATES[name].read_text(encoding="utf-8")
    found = set(re.findall(r"<[|｜]?[\w▁]+[|｜]?>|</?think>", text))
    thoughts = {token for token in found if re.fullmatch("</?think>", token)}
    tokenizer.add_tokens(sorted(thoughts))
    tokenizer.add_tokens(sorted(found - thoughts), special_tokens=True)
    tokenizer.chat_template, tokenizer.bos_token = text, tokenizer.pad_token
    return tokenizer


def make_family(folder: Path, family: str, tokenizer: Any) -> Path:
    """Save a random two-layer model of a family with `tokenizer`, which gets the family's template, into `folder`."""
    import torch  # noqa: PLC0415 - the settings are to be had without it
    import transformers  # noqa: PLC0415

    kind, template, more = FAMILIES[family]
    set_template(tokenizer, template)
    torch.manual_seed(0)
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = _config(kind, **tokens, vocab_size=len(tokenizer), **more)
    automatic: Any = transformers.AutoModelForCausalLM
    automatic.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_config(folder: Path, family: str) -> Path:
    """Write the config.json of a tiny model of one of `FAMILIES` or `UNTRAINED`, and nothing else, into `folder`."""
    kind, more = (FAMILIES[family][0], FAMILIES[family][2]) if family in FAMILIES else UNTRAINED[family]
    _config(kind, vocab_size=64, bos_token_id=None, eos_token_id=1, pad_token_id=2, **more).save_pretrained(folder)
    return folder


def _config(kind: str, **more: Any) -> Any:
    import transformers  # noqa: PLC0415

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
    }
    return getattr(transformers, kind)(**{**sizes, **more})
