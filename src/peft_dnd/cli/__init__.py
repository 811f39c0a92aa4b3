# SPDX-License-Identifier: Apache-2.0
"""The `peft-dnd` command."""

from __future__ import annotations
