"""How must a language model be fine-tuned so that a long, free-form text is written into it?

A reconstruction of "Is Fine-Tuning an Effective Solution? Reassessing Knowledge Editing for
Unstructured Data" (arXiv 2506.09672). The data flow:

params -> notebook -> Edits + locality Probes -> answer (no edit) -> edited(model)
    -> answer (edited) -> score -> rows -> tables, figures -> report

The packages, from the bottom; a package imports only from those above it in this list:

errors, project, files   bad input in one line; every path; whole files or none
data        benchmark files -> validated Edits with their Probes; the table of probe kinds
world       the fictional world of the embedded model, in the file formats of the benchmarks
results     metrics, intervals and tests, the schema of rows, comparisons between methods
locality    RelDoc, RandDoc, StructTrip and near triples: built, written, audited
models      a model's weights, prompts and greedy answers
report      figures, tables, sections, verdicts, HTML and PDF (sees only data and results)
methods     how a text is written: recipes, fine-tuning in lanes, locate-then-edit solvers
study       edits with all their probes -> rows, resumable; the factor studies
explore     one edit by hand, with widgets
cli         `python -m uke`: run a notebook, check parameters, compose the report

Nothing above `models` imports torch, nor does `report`: reading rows is quick.
"""
