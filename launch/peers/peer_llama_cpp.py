"""llama.cpp through llama-cpp-python's low-level API: all lanes in one batch, a sequence each, greedy.

The weights are converted to GGUF in the workload's precision, which the cache has too (llama.cpp's own choice is
float16). pip builds llama.cpp for this processor (GGML_NATIVE) with its fast float32 products (GGML_LLAMAFILE) and
OpenMP, which are its defaults. Each lane count has a context of its own, just as long as needed. Two modes are
measured, and the faster one at each lane count is reported:
    plain     without flash attention
    flash     with it
A cache that all sequences share (kv_unified) is left out: every lane would attend to every lane's cells, masked.
"""

import importlib.metadata
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import gguf
import llama_cpp
import numpy as np
import protocol
from safetensors import safe_open

METHOD = "the calls of llama_decode are timed one by one, with the choice of tokens; the first one holds the prompts"
_TYPES = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}
_ALL_LAYERS = 999
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_LEVEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@llama_cpp.llama_log_callback
def _log_errors(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


def modes(workload: protocol.Workload) -> dict[str, Callable[[], protocol.Decode]]:
    llama_cpp.llama_log_set(_log_errors, None)
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory(prefix="gguf-") as folder:
        path = pathlib.Path(folder) / "model.gguf"
        _convert(pathlib.Path(workload.model), path, workload.precision)
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = False  # the file goes away
        settings.n_gpu_layers = _ALL_LAYERS if workload.device == "gpu" else 0
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    if not model:
        raise RuntimeError("llama.cpp could not load the converted model")
    return {
        "plain": lambda: _decode(model, workload, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED),
        "flash": lambda: _decode(model, workload, llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED),
    }


def _decode(model: Any, workload: protocol.Workload, flash_attention: int) -> protocol.Decode:
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def decode(prompts: list[list[int]]) -> protocol.Pass:
        context = _context(model, workload, prompts, flash_attention)
        batch = llama_cpp.llama_batch_init(sum(map(len, prompts)), 0, 1)
        try:
            return _run(context, batch, prompts, workload.new_tokens, vocab_size)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    return decode


def _run(context: Any, batch: Any, prompts: list[list[int]], new_tokens: int, vocab_size: int) -> protocol.Pass:
    times = [time.perf_counter()]
    rows, positions = prompts, [0] * len(prompts)
    written: list[list[int]] = [[] for _ in prompts]
    for _ in range(new_tokens):
        _fill(batch, rows, positions)
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        logits_LV = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(prompts), vocab_size))
        chosen = logits_LV.argmax(axis=1).tolist()
        times.append(time.perf_counter())
        positions = [position + len(row) for position, row in zip(positions, rows, strict=True)]
        rows = [[token] for token in chosen]
        for tokens, token in zip(written, chosen, strict=True):
            tokens.append(token)
    return protocol.Pass(
        prefill_seconds=times[1] - times[0],
        decode_seconds=times[-1] - times[1],
        steps=new_tokens - 1,
        tokens=written,
    )


def _context(model: Any, workload: protocol.Workload, prompts: list[list[int]], flash_attention: int) -> Any:
    settings = llama_cpp.llama_context_default_params()
    settings.n_seq_max = len(prompts)
    settings.n_ctx = len(prompts) * (max(map(len, prompts)) + workload.new_tokens)
    settings.n_batch = sum(map(len, prompts))
    settings.n_threads = settings.n_threads_batch = workload.threads
    settings.type_k = settings.type_v = int(_TYPES[workload.precision])
    settings.flash_attn_type = flash_attention
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError(f"llama.cpp could not make a context of {len(prompts)} sequences")
    return context


def _fill(batch: Any, rows: list[list[int]], positions: list[int]) -> None:
    """Put each sequence's next tokens into the batch, and ask for the last one's logits only."""
    index = 0
    for sequence, (row, position) in enumerate(zip(rows, positions, strict=True)):
        for offset, token in enumerate(row):
            batch.token[index] = token
            batch.pos[index] = position + offset
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = offset == len(row) - 1
            index += 1
    batch.n_tokens = index


def _convert(folder: pathlib.Path, path: pathlib.Path, precision: str) -> None:
    """Write a Hugging Face Llama as GGUF, without a tokenizer. Norms stay in float32."""
    values = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_key_length(values["head_dim"])
    writer.add_value_length(values["head_dim"])
    writer.add_rope_dimension_count(values["head_dim"])
    writer.add_rope_freq_base(values["rope_theta"])
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    writer.add_vocab_size(values["vocab_size"])
    types = {"float32": gguf.LlamaFileType.ALL_F32, "bfloat16": gguf.LlamaFileType.MOSTLY_BF16}
    writer.add_file_type(types[precision])
    writer.add_tokenizer_model("none")
    heads = {"q_proj": values["num_attention_heads"], "k_proj": values["num_key_value_heads"]}
    with safe_open(folder / "model.safetensors", framework="np") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - safe_open is no dictionary
            array = tensors.get_tensor(name)
            projection = name.split(".")[-2]
            if projection in heads:
                array = _interleave(array, heads[projection])
            kept = _TYPES[precision] if array.ndim > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(array, kept), raw_dtype=kept)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _TOP_LEVEL:
        return f"{_TOP_LEVEL[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_TENSORS[rest]}.weight"


def _interleave(weight: Any, heads: int) -> Any:
    """Reorder RoPE's pairs: Hugging Face has them half a head apart, GGUF's `llama` side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


if __name__ == "__main__":
    version = f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"
    protocol.main("llama_cpp", version, METHOD, modes)
