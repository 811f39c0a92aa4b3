# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What tests of text encoders share."""

from __future__ import annotations

from peft_dnd.prompts import TokenStates


PROMPTS = ["what is the capital ?", "a river", "law", "what is tax law ? please answer in one word .", "of a", "a law"]


def bytes_of(states: TokenStates) -> list[bytes]:
    """Each prompt's states to the bit."""
    return [states[i].numpy().tobytes() for i in range(len(states))]
