"""A reconstruction of "Is Fine-Tuning an Effective Solution? Reassessing Knowledge Editing for Unstructured Data"
(arXiv 2506.09672): how must a language model be fine-tuned so that a long, free-form text is really written into it?

params -> notebook -> Edits + documents -> locality Probes -> answer (before) -> edited(model) -> answer (after) -> score -> rows -> tables, figures -> report

The rooms, from the bottom; nothing imports from a room below it on this list:

errors                       the error of bad input, and of an edit that diverges
records, formats, edits      benchmark files -> validated Edits with their Probes
similarity, intervals, metrics   scores, bootstrap intervals, paired tests
paths, rows                  where a run writes; the row schema, resumption, averages
recipes, peers, methods      every choice of one way to fine-tune, or to locate and edit; the factors under study
params                       strict parameters; where a benchmark's files lie
numerals, tables, effects, leads, speed, drawing, figures, panels, diagrams   one style; one function per kind of table and of figure
manifests, abstract, arrangement, typesetting, redrawing, report   what ran, and when; the paragraph on top; main part and appendix; HTML and PDF; figures and tables from stored data; numbers said once
verdicts                     each claim of the paper beside the numbers that decide it
world, world_files           the fictional world, and its files in the benchmarks' formats
streams, dumps, wikitext, documents   Wikipedia and other collections -> Documents, streamed
phrases, extraction          the facts of a text, and whether two texts share one
ranking, embedding, dual_encoder, retrieval   documents by relevance: BM25, MiniLM, MiniLM trained
locality, locality_files, audit, materials   RelDoc, RandDoc, StructTrip, near triple: built, written, audited; edits with their probes
models, padding, forwards, lanes, recall, answering   a model, its prompts and weights; rows of like length; how a module reads, replaced for a while; many edits side by side; answers kept; many at once
pretraining, knowledge       how the embedded model was made, and what it knows
finetune                     losses and training
locate, values, moments      where to write; hidden states wanted there; what must stay: second moments, projectors
baselines                    the solvers: MEMIT, AlphaEdit, UnKE
editing, lane_training, apart   `with edited(model, tokenizer, edits, method) as m:`; every edit alone, side by side in lanes
memory, asking, studies      what a training takes and how it takes less; ask before, edit, ask after, score, append rows; skip what is done, here or by another study of the run
sequences                    the same for edits that pile up in the same weights
ways                         the published loop, one by one, lanes: the same edits timed three ways (`benchmarks/`)
markup, likelihood, choices, surroundings, workbench, sessions   one edit by hand: shown, read token by token, chosen, asked about, written, repeated
errands, controls, explore   one thing at a time beside the kernel; the widgets of notebooks/explore.ipynb
preflight, kernels, run      checks before a start; one notebook, headlessly

Everything up to `materials` imports no torch, so a notebook that only reads rows opens at once.
"""

import warnings

# peft asks transformers for this under its old name; the reader of a notebook can do nothing about it.
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)
