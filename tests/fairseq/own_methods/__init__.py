"""A user-dir for the tests: registers methods of its own, then brings the plugin's tasks, which have their flags."""

from tests.own_methods import register

register()

import fairseq_plugin  # noqa: E402, F401
