"""Evaluation of students, teachers and published weights: long-caption retrieval and zero-shot classification."""
