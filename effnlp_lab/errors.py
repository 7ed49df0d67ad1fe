"""Errors of the kit. Each carries one sentence: what was wrong, what was expected, what to do."""

from __future__ import annotations


class EffnlpError(ValueError):
    """Base of every error that the kit raises on purpose. The command line prints its sentence and exits with 2."""


class DeviceError(EffnlpError):
    """The device that was asked for cannot be used here."""


class UsageError(EffnlpError):
    """A command or a function was given something it cannot work with."""
