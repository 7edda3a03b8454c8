"""Bounds on what retraining does to outputs, beside what is measured."""
