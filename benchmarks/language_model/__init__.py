# SPDX-License-Identifier: Apache-2.0
"""The generator on a real language model: its world of tasks, its fitting and its judging."""

from __future__ import annotations
