# SPDX-License-Identifier: Apache-2.0
"""The `peft-dnd` command, a file a verb. The installed command imports them as `peft_dnd_cli`, which says why."""

from __future__ import annotations
