"""Translation with ResMLP."""

from shared.run.packages import need_packages

need_packages("resmlp/translation", sentencepiece="sentencepiece", sacrebleu="sacrebleu")
