from __future__ import annotations

import pytest

from common.certificates import files


@pytest.mark.parametrize(
    "host, names, is_one",
    [
        ("fed.example.org", ["fed.example.org"], True),
        ("FED.example.org", ["fed.Example.org"], True),
        ("fed.example.org", ["*.example.org"], True),
        ("a.fed.example.org", ["*.example.org"], False),
        ("example.org", ["*.example.org"], False),
        ("localhost", ["*.localhost"], False),
        ("10.0.0.1", ["10.0.0.1"], True),
        ("10.0.0.1", ["*.0.0.1"], False),
        ("::1", ["::1"], True),
        ("0:0:0:0:0:0:0:1", ["::1"], True),
        ("fed", [], False),
    ],
)
def test_a_host_is_one_of_a_certificates_names(host, names, is_one):
    assert files.is_for(host, names) is is_one
