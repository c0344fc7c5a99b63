"""Results without a model: scores of answers, intervals and tests, stored rows, comparisons."""
