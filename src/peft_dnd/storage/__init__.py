# SPDX-License-Identifier: Apache-2.0
"""Where things lie: whole files or none, the Hub, weights read in slices; which process writes, and its bars."""

from __future__ import annotations
