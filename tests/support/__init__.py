# SPDX-License-Identifier: Apache-2.0
"""What the tests share: tiny models, pairs, references."""
