"""The card of a published model, filled by its run: the metadata that the hub reads, and the text.

Nothing in it is typed by hand, so nothing in it can differ from what was run. Imports no torch.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from r1pipe import __version__
from r1pipe.data.problems import read_constants
from r1pipe.evals.tables import draw_table, format_table
from r1pipe.models.quirks import find_quirks
from r1pipe.publish.licenses import LicenseSource
from r1pipe.report.costs import describe_costs
from r1pipe.runs.hashes import hash_file
from r1pipe.runs.ledger import LEDGER
from r1pipe.runs.lineage import FILE as LINEAGE
from r1pipe.runs.lineage import hide_places, read_lineage
from r1pipe.runs.reader import Evaluation, FinishedRun, StageFolder

if TYPE_CHECKING:
    from r1pipe.models.gguf import Splitting

SHARES = {
    "pass_at_1": "pass@1",
    "pass_at_k": "pass@{k}",
    "maj_at_k": "maj@{k}",
}
"""The figures of a summary that go into `model-index`, and the hub's names for them."""


THINKS = " It was trained to write its reasoning between `<think>` and `</think>`, then the answer."


@dataclass(frozen=True)
class TrainingData:
    """One data recipe of a stage, as the card shows it."""

    stage: StageFolder
    name: str
    """The recipe's, or the path of the rows that it was given."""
    split: str
    hub_id: str | None
    licence: str | None
    """What the recipe says; None: nothing."""


@dataclass(frozen=True)
class CardFacts:
    """What a card tells; everything is read from the run's folder."""

    repo_id: str
    run: FinishedRun
    stage: StageFolder
    model_type: str
    num_parameters: int
    dtype: str
    base_model: str | None
    """What it was trained from (a hub id or a folder); None: random weights."""
    base_hub_id: str | None
    licence: str
    sources: list[LicenseSource]
    data: list[TrainingData]
    evaluations: list[Evaluation]
    objections: list[str]
    """What `--force` went on in spite of."""
    hashes: dict[str, str]
    """SHA-256 of the published weights, by file."""
    messages: list[dict[str, str]]
    """A prompt, for the examples."""
    gguf_type: str | None
    """Of the GGUF file, if there is one."""
    gguf_splitting: "Splitting | None"

    @property
    def name(self) -> str:
        return self.repo_id.split("/")[1]

    @property
    def lineage(self) -> list[StageFolder]:
        return self.run.lineage(self.stage.name)


def write_model_card(facts: CardFacts) -> str:
    """README.md of the model's repository."""
    metadata = ModelCardData(
        license=facts.licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=facts.base_hub_id,
        base_model_relation="finetune" if facts.base_hub_id else None,
        datasets=sorted({d.hub_id for d in facts.data if d.hub_id}) or None,
        tags=["r1pipe", "reasoning", *sorted({stage.kind for stage in facts.lineage} - {"init"})],
        model_name=facts.name,
        eval_results=[r for e in facts.evaluations for r in list_results(e)] or None,
    )
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {facts.name}",
        describe_model(facts),
        *describe_objections(facts),
        "## Evaluation",
        *(describe_evaluation(facts, evaluation) for evaluation in facts.evaluations),
        "## How to run it",
        fence("python", write_transformers_example(facts)),
        fence("python", write_vllm_example(facts)),
        *describe_gguf(facts),
        "## What it was made from",
        describe_sources(facts),
        "## Training data",
        describe_data(facts),
        "## Cost",
        describe_cost(facts),
        "## Limits",
        describe_limits(facts),
        "## Recipe",
        "Every setting, as it was resolved, in the order of the stages:",
        fence("yaml", dump_recipe(facts)),
        "## Lineage",
        describe_lineage(facts),
    ]
    return "\n\n".join(sections) + "\n"


def list_results(evaluation: Evaluation) -> list[EvalResult]:
    """The figures of one evaluation for the card's `model-index`."""
    entry = evaluation.entry
    protocol = {
        key: entry[key]
        for key in ("num_problems", "num_samples", "temperature", "top_p", "max_completion_length")
    }
    data = evaluation.data
    dataset = read_constants(data.recipe).get("HUB_ID", data.recipe) if data.recipe else data.label
    results = []
    for key, template in SHARES.items():
        name = template.format(k=entry["k"])
        arguments = {**protocol, "overlap": entry["overlap"]}
        if entry[key] is None:  # there is no majority of programs
            continue
        if key == "pass_at_1":
            arguments |= {"ci_95_low": entry["ci_low"], "ci_95_high": entry["ci_high"]}
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=entry["dataset"],
                dataset_split=data.split,
                metric_type=name,
                metric_name=name,
                metric_value=entry[key],
                metric_args=arguments,
            )
        )
    return results


def describe_model(facts: CardFacts) -> str:
    start = (
        f"trained from `{hide_places(facts.base_model)}`"
        if facts.base_model
        else "from random weights"
    )
    return (
        f"A {facts.model_type} model of {facts.num_parameters:,} parameters in {facts.dtype}, "
        f"{start}: the stage `{facts.stage.name}` ({facts.stage.section.how_made}) of the run "
        f"`{facts.run.path.name}`, "
        f"made and published with r1pipe {__version__}."
        + (THINKS if facts.stage.section.optimization else "")
    )


def describe_objections(facts: CardFacts) -> list[str]:
    if not facts.objections:
        return []
    lines = ["> [!WARNING]", "> Published with `--force` in spite of this:", ">"]
    return ["\n".join([*lines, *(f"> - {objection}" for objection in facts.objections)])]


def describe_evaluation(facts: CardFacts, evaluation: Evaluation) -> str:
    """The checkpoint beside those that it comes from, on the same problems."""
    names = {facts.base_model, *(stage.name for stage in facts.lineage)}
    rows: list[dict[str, Any]] = []
    for entry in evaluation.stage.read_summary():
        if entry["stage"] in names and entry["dataset"] == evaluation.entry["dataset"]:
            compared = entry.get("compared_with")
            if not rows or compared is None or compared["stage"] != rows[-1]["stage"]:
                entry = {**entry, "compared_with": None}
            rows.append(entry)
    return format_table([{**row, "stage": hide_places(row["stage"])} for row in rows])


def write_transformers_example(facts: CardFacts) -> str:
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{facts.repo_id}")
model = AutoModelForCausalLM.from_pretrained("{facts.repo_id}", dtype="{facts.dtype}")
messages = {format_messages(facts.messages)}
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens={longest_completion(facts)})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def write_vllm_example(facts: CardFacts) -> str:
    """The dtype is said, because vLLM's own choice turns float32 into bfloat16."""
    quirks = find_quirks(facts.model_type)
    imports, on_cpu, settings = "", "", f'dtype="{facts.dtype}"'
    if quirks.cpu_engine:  # of models with latent attention, which CPUs cannot compute as such
        lines = ['os.environ["VLLM_MLA_DISABLE"] = "1"']
        lines += [f'settings["{name}"] = {v!r}' for name, v in quirks.cpu_engine.items()]
        imports = "import os\n\nimport torch\n"
        on_cpu = (
            f'    settings = {{"dtype": "{facts.dtype}"}}\n'
            "    if not torch.cuda.is_available():  # what vLLM's kernels for CPUs need\n"
            + "".join(f"        {line}\n" for line in lines)
        )
        settings = "**settings"
    return f"""\
{imports}from vllm import LLM

if __name__ == "__main__":
{on_cpu}    llm = LLM("{facts.repo_id}", {settings})
    sampling = llm.get_default_sampling_params()
    sampling.max_tokens = {longest_completion(facts)}
    messages = {format_messages(facts.messages)}
    [output] = llm.chat(messages, sampling)
    print(output.outputs[0].text)
"""


def describe_gguf(facts: CardFacts) -> list[str]:
    if facts.gguf_type is None:
        return []
    generation = facts.evaluations[0].entry if facts.evaluations else {}
    sampling = "".join(
        f" --{option} {generation[key]}"
        for option, key in (("temp", "temperature"), ("top-p", "top_p"))
        if key in generation
    )
    splitting = facts.gguf_splitting
    note = (
        f"text is split as the tokenizer splits it (llama.cpp's `{splitting.name}`)"
        if splitting.is_exact
        else "llama.cpp has not the tokenizer's own splitting of text; its "
        f"`{splitting.name}` gave the same tokens for {splitting.num_texts} prompts and "
        "completions of the evaluation, and may give others for text of another kind"
    )
    place = f"{facts.repo_id}:{facts.gguf_type}"
    return [
        fence("bash", f"llama-cli -hf {place} --jinja{sampling}\nollama run hf.co/{place}\n"),
        f"`{facts.name}-{facts.gguf_type}.gguf` is for llama.cpp and what is built on it: {note}. "
        "The figures above were not measured with it.",
    ]


def format_messages(messages: list[dict[str, str]]) -> str:
    return repr([{"role": m["role"], "content": m["content"]} for m in messages])


def longest_completion(facts: CardFacts) -> int:
    """Tokens that the model was measured with."""
    lengths = [e.entry["max_completion_length"] for e in facts.evaluations]
    return max(lengths, default=256)


def describe_sources(facts: CardFacts) -> str:
    rows = [[s.role, f"`{hide_places(s.name)}`", s.licence] for s in facts.sources]
    if facts.base_model is None:
        rows.insert(0, ["base model", "none: random weights", ""])
    return (
        format_rows(["", "", "licence"], rows)
        + f"\n\nThe model's own licence, which these allow: {facts.licence}."
    )


def describe_data(facts: CardFacts) -> str:
    rows = []
    for data in facts.data:
        record = data.stage.record
        dropped, rate = record.get("overlap_dropped"), record.get("overlap_rate")
        rows.append(
            [
                data.stage.name,
                f"`{hide_places(data.name)}`",
                data.split,
                record.get("train_rows", ""),
                "not compared" if dropped is None else f"{dropped} ({rate:.2%})",
            ]
        )
    ngram = facts.stage.settings["ngram"]
    return (
        format_rows(["stage", "data", "split", "rows trained on", "dropped for overlap"], rows)
        + f"\n\nRows that share {ngram} words in a row with a held-out problem were dropped before "
        f"training. Contamination of this model: {describe_overlap(facts)}."
    )


def describe_overlap(facts: CardFacts) -> str:
    if not facts.evaluations:
        return "unknown, for it was not evaluated"
    overlaps = [e.entry["overlap"] for e in facts.evaluations]
    if None in overlaps:
        return f"unknown, for it is not known what {hide_places(facts.base_model)} was trained on"
    return f"{max(overlaps):.1%} of the held-out problems overlap with what it was trained on"


def describe_cost(facts: CardFacts) -> str:
    """Of the whole run, by its ledger; of a run without one what the stages have noted."""
    if (facts.run.path / LEDGER).exists():
        table, notes = describe_costs(facts.run.path).split("\n\n", 1)
        return f"{table}\n\n" + "\n".join(f"- {note}" for note in notes.splitlines())
    rows = [
        [s.name, s.kind, f"{s.record['wall_s']:.0f} s", f"{s.record['peak_memory_gib']} GiB"]
        for s in facts.lineage
    ]
    total = sum(s.record["wall_s"] for s in facts.lineage)
    return (
        format_rows(["stage", "kind", "wall time", "peak memory"], rows)
        + f"\n\n{total:.0f} s in all, evaluation not counted."
    )


def describe_limits(facts: CardFacts) -> str:
    sets = sorted({e.entry["dataset"] for e in facts.evaluations})
    lines = [
        f"It was measured on {', '.join(sets) or 'nothing'} and nothing else: what it does on "
        "other tasks, in other languages or in longer conversations is not known.",
        "Its reasoning is text that was rewarded for right answers. It need not be how the "
        "answer came about.",
        "It was not trained to refuse anything, and its safety was not evaluated.",
    ]
    for evaluation in facts.evaluations:
        entry = evaluation.entry
        if entry["truncated"] > 0:
            lines.append(
                f"{entry['truncated']:.1%} of its samples on {entry['dataset']} were cut at "
                f"{entry['max_completion_length']} tokens and count as wrong."
            )
        if entry["unjudged"] > 0:
            lines.append(
                f"{entry['unjudged']:.1%} of its samples on {entry['dataset']} could not be judged "
                "and count as wrong."
            )
        if entry["num_problems"] < 100:
            lines.append(
                f"{entry['dataset']} is {entry['num_problems']} problems here: see the interval."
            )
    return "\n".join(f"- {line}" for line in lines)


def dump_recipe(facts: CardFacts) -> str:
    """The stages that the model comes from and was measured by, as one recipe."""
    stages = facts.lineage + [e.stage for e in facts.evaluations]
    shared = {key: value for key, value in facts.stage.config.items() if key != "stage"}
    sections = [s.config.get("stage") or hide_places(s.settings) for s in stages]
    recipe = {**shared, "stages": sections}
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)


def describe_lineage(facts: CardFacts) -> str:
    """What `r1pipe verify` compares, down to the hash of each stage's own record."""
    rows = []
    for stage in [*facts.lineage, *(e.stage for e in facts.evaluations)]:
        file, record = stage.folder / LINEAGE, read_lineage(stage.folder) or {}
        commit = (record.get("git") or {}).get("commit")
        rows.append(
            [
                stage.name,
                ", ".join(map(hide_places, stage.parents)),
                stage.record["finished"],
                f"`{commit[:12]}`" if commit else "",
                f"`{hash_file(file)}`" if file.exists() else "none",
            ]
        )
    files = [[f"`{name}`", f"`{digest}`"] for name, digest in facts.hashes.items()]
    return "\n\n".join(
        [
            format_rows(["stage", "from", "finished", "r1pipe at", f"SHA-256 of {LINEAGE}"], rows),
            format_rows(["published file", "SHA-256"], files),
        ]
    )


def write_dataset_card(facts: CardFacts, num_rows: dict[str, int]) -> str:
    """README.md of the rollouts' repository. `num_rows`: by file or pattern of files."""
    metadata = DatasetCardData(
        license=facts.licence,
        task_categories=["text-generation"],
        tags=["r1pipe", "reasoning", "rollouts"],
        configs=[
            {
                "config_name": re.sub(r"(/\*)?\.\w+$", "", files).replace("/", "-"),
                "data_files": files,
            }
            for files in num_rows
        ],
    )
    rows = [[f"`{files}`", f"{count:,}"] for files, count in num_rows.items()]
    return (
        "\n\n".join(
            [
                f"---\n{metadata.to_yaml()}\n---",
                f"# Rollouts of {facts.name}",
                f"What the policies of the run `{facts.run.path.name}` sampled on the way to "
                f"[{facts.repo_id}](https://huggingface.co/{facts.repo_id}), with the rewards of "
                "each sample; written by models, judged by rules.",
                format_rows(["files", "rows"], rows),
                describe_sources(facts),
            ]
        )
        + "\n"
    )


def fence(language: str, text: str) -> str:
    return f"```{language}\n{text}```"


def format_rows(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    return draw_table([header, *([str(cell) for cell in row] for row in rows)])
