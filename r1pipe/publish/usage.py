"""A card's section "How to run it"."""

from typing import TYPE_CHECKING

from r1pipe.models.quirks import find_quirks

if TYPE_CHECKING:
    from r1pipe.publish.card import Card


def write_transformers_example(card: "Card") -> str:
    imports, adapted, weights = "", "", card.repo_id
    if card.is_adapter:
        imports, weights = "from peft import PeftModel\n", card.origin.base_hub_id
        adapted = f'model = PeftModel.from_pretrained(model, "{card.repo_id}")\n'
    return f"""\
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{card.repo_id}")
model = AutoModelForCausalLM.from_pretrained("{weights}", dtype="{card.artifacts.dtype}")
{adapted}messages = {format_messages(card.candidate.find_prompt())}
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens={longest_completion(card)})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def write_vllm_example(card: "Card") -> str:
    """With a dtype: vLLM's default turns float32 into bfloat16."""
    quirks = find_quirks(card.artifacts.model_type)
    imports, on_cpu, settings = "", "", f'dtype="{card.artifacts.dtype}"'
    if quirks.cpu_engine:  # for latent attention, which vLLM's CPU kernels do not have
        lines = ['os.environ["VLLM_MLA_DISABLE"] = "1"']
        lines += [f'settings["{name}"] = {v!r}' for name, v in quirks.cpu_engine.items()]
        imports = "import os\n\nimport torch\n"
        on_cpu = (
            f'    settings = {{"dtype": "{card.artifacts.dtype}"}}\n'
            "    if not torch.cuda.is_available():  # what vLLM's kernels for CPUs need\n"
            + "".join(f"        {line}\n" for line in lines)
        )
        settings = "**settings"
    return f"""\
{imports}from vllm import LLM

if __name__ == "__main__":
{on_cpu}    llm = LLM("{card.repo_id}", {settings})
    sampling = llm.get_default_sampling_params()
    sampling.max_tokens = {longest_completion(card)}
    messages = {format_messages(card.candidate.find_prompt())}
    [output] = llm.chat(messages, sampling)
    print(output.outputs[0].text)
"""


def describe_gguf(card: "Card") -> list[str]:
    if card.artifacts.gguf_type is None:
        return []
    generation = card.evaluations[0].entry if card.evaluations else {}
    sampling = "".join(
        f" --{option} {generation[key]}"
        for option, key in (("temp", "temperature"), ("top-p", "top_p"))
        if key in generation
    )
    splitting = card.artifacts.gguf_splitting
    note = (
        f"text is split as the tokenizer splits it (llama.cpp's `{splitting.name}`)"
        if splitting.is_exact
        else "llama.cpp has not the tokenizer's own splitting of text; its "
        f"`{splitting.name}` gave the same tokens for {splitting.num_texts} prompts and "
        "completions of the evaluation, and may give others for text of another kind"
    )
    place = f"{card.repo_id}:{card.artifacts.gguf_type}"
    return [
        fence("bash", f"llama-cli -hf {place} --jinja{sampling}\nollama run hf.co/{place}\n"),
        f"`{card.name}-{card.artifacts.gguf_type}.gguf` is for llama.cpp and programs built on it: "
        f"{note}. The figures above were not measured with it.",
    ]


def format_messages(messages: list[dict[str, str]]) -> str:
    return repr([{"role": m["role"], "content": m["content"]} for m in messages])


def longest_completion(card: "Card") -> int:
    """Tokens that the model was evaluated with."""
    lengths = [e.entry["max_completion_length"] for e in card.evaluations]
    return max(lengths, default=256)


def fence(language: str, text: str) -> str:
    return f"```{language}\n{text}```"
