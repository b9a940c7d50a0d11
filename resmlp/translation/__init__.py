"""Translation with ResMLP."""

from shared.packages import need_packages

need_packages("resmlp/translation", sentencepiece="sentencepiece", sacrebleu="sacrebleu")
