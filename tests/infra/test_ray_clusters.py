"""The cluster files of Ray's launcher, by Ray's own schema and preparation; AWS also against an emulated EC2.

The nearest thing to a dry run: `ray up` without machines ends where it would start the first one.
"""

import copy
import os
import re

import pytest
import yaml

FILES = ("ray-cluster-onprem.yaml", "ray-cluster-aws.yaml")
PLACEHOLDER = re.compile(r"(?<!\$)\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b|\b(?:REGION|ZONE|REGISTRY)\b|/SHARED\b")
FILLED = {"REGION": "us-east-1", "ZONE": "us-east-1a", "HEAD_ADDRESS": "192.0.2.1", "WORKER_1_ADDRESS": "192.0.2.2"}
FILLED |= {"WORKER_2_ADDRESS": "192.0.2.3", "AMI_WITH_DOCKER_AND_NVIDIA_DRIVER": "ami-00000000000000000"}


@pytest.fixture
def filled(root):
    """A cluster file with its placeholders filled in, as one who follows the README has it."""

    def fill(name):
        text = (root / "infra" / name).read_text()
        return yaml.safe_load(PLACEHOLDER.sub(lambda found: FILLED.get(found[0], "filled"), text))

    return fill


@pytest.fixture
def prepared(filled, monkeypatch, tmp_path):
    """A cluster's configuration as `ray up` completes and checks it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    # careful: the local provider keeps its state in the temporary folder
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))

    def prepare(name):
        config = prepare_config(filled(name))
        validate_config(config)
        return config

    return prepare


@pytest.mark.parametrize("name", FILES)
def test_a_cluster_file_passes_ray_s_own_schema_as_written_and_as_completed(manifest, prepared, name):
    import json
    from pathlib import Path

    import jsonschema
    import ray.autoscaler

    written = manifest(name)
    completed = prepared(name)
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    if name == "ray-cluster-aws.yaml":
        # the local provider's min_workers is Ray's own legacy key, which preparation turns into node types
        jsonschema.validate(written, schema)
    assert completed["head_node_type"] in completed["available_node_types"]


def test_the_schema_refuses_a_misspelt_key(filled, monkeypatch):
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = filled("ray-cluster-aws.yaml")
    config["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(config))


def test_on_premise_every_machine_named_becomes_a_node_at_once(prepared):
    config = prepared("ray-cluster-onprem.yaml")
    (kind,) = config["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])


def test_on_aws_gpu_workers_are_spot_and_the_head_is_not(manifest):
    kinds = manifest("ray-cluster-aws.yaml")["available_node_types"]
    assert kinds["gpu_worker"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in kinds["head"]["node_config"]
    assert kinds["gpu_worker"]["resources"]["GPU"] == 1
    # scsae refuses an actor that fits on no node, so the first one cannot wait for its machine
    assert kinds["gpu_worker"]["min_workers"] >= 1


def test_the_aws_file_goes_through_ray_s_bootstrap_against_an_emulated_ec2(prepared, monkeypatch, tmp_path):
    moto = pytest.importorskip("moto", reason="moto, which emulates EC2, is not installed")
    pytest.importorskip("boto3", reason="boto3 is not installed")
    for key in [key for key in os.environ if key.startswith("AWS_")]:
        monkeypatch.delenv(key)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "emulated")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    from ray.autoscaler._private.aws import config as aws

    with moto.mock_aws():
        made = aws.bootstrap_aws(copy.deepcopy(prepared("ray-cluster-aws.yaml")))
    for kind in made["available_node_types"].values():
        assert {"KeyName", "SubnetIds", "SecurityGroupIds"} <= set(kind["node_config"])


@pytest.mark.parametrize("name", FILES)
def test_every_placeholder_is_named_in_the_readme_and_no_machine_is(root, name):
    text = (root / "infra" / name).read_text()
    readme = (root / "infra" / "README.md").read_text()
    found = {placeholder.removeprefix("/") for placeholder in PLACEHOLDER.findall(text)}
    assert found
    assert not [placeholder for placeholder in found if f"`{placeholder}`" not in readme]
    assert not re.search(r"\b\d{1,3}(?:\.\d{1,3}){3}\b", text.replace("127.0.0.1", ""))


@pytest.mark.parametrize("name", FILES)
def test_the_jobs_api_listens_on_the_loopback_alone(manifest, name):
    (start,) = [line for line in manifest(name)["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in start
