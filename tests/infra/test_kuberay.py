"""The manifests of infra/kuberay: pods and the volume claim by Kubernetes' own schemas, the rest by KubeRay's rules.

No package was found that carries KubeRay's own definitions (the CRDs), so the manifests were NOT validated against
them. Checked instead: the keys of `RayClusterSpec`, `HeadGroupSpec`, `WorkerGroupSpec` and `RayJobSpec` in its API v1,
and what its documentation asks for. An API server refuses no unknown key of a CRD, it drops it: a misspelt one would do
nothing, silently, which is why the keys are checked.
"""

import pytest
import yaml

PODS = ("ray-cluster.yaml", "ray-job.yaml")
KUBERNETES = "1.30"
JOB_KEYS = """activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector
submitterConfig managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources
entrypointNumCpus entrypointNumGpus ttlSecondsAfterFinished shutdownAfterJobFinishes suspend""".split()
CLUSTER_KEYS = """headGroupSpec workerGroupSpecs rayVersion enableInTreeAutoscaling autoscalerOptions
headServiceAnnotations suspend""".split()
HEAD_KEYS = "serviceType headService enableIngress rayStartParams template".split()
WORKER_KEYS = "groupName replicas minReplicas maxReplicas numOfHosts rayStartParams template scaleStrategy".split()


@pytest.fixture
def cluster(manifest):
    """The cluster's specification in a manifest of either kind."""

    def spec(name):
        found = manifest(f"kuberay/{name}")["spec"]
        return found.get("rayClusterSpec", found)

    return spec


@pytest.fixture
def pods(cluster):
    """Head and workers of a cluster, as pods."""

    def templates(name):
        groups = [cluster(name)["headGroupSpec"], *cluster(name)["workerGroupSpecs"]]
        return [group["template"] for group in groups]

    return templates


@pytest.fixture
def validate():
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate",
        reason="kubernetes-validate (22 MB of schemas) is not installed: pip install -e '.[infra]'",
    )
    return lambda content: kubernetes_validate.validate(content, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", PODS)
def test_every_pod_passes_the_strict_schema_of_kubernetes(pods, validate, name):
    for template in pods(name):
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "checked"}, "spec": template["spec"]})


def test_the_strict_schema_refuses_a_misspelt_key(pods, validate):
    (head, _) = pods("ray-job.yaml")
    head["spec"]["containers"][0]["imagePullPolicee"] = "Always"
    with pytest.raises(Exception, match="imagePullPolicee"):
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "checked"}, "spec": head["spec"]})


def test_the_volume_claim_passes_the_strict_schema_and_is_for_many_writers(manifest, validate):
    claim = manifest("kuberay/store-pvc.yaml")
    validate(claim)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize(("name", "kind"), [("ray-cluster.yaml", "RayCluster"), ("ray-job.yaml", "RayJob")])
def test_kinds_and_keys_are_those_of_kuberay_s_api(manifest, cluster, name, kind):
    found = manifest(f"kuberay/{name}")
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", kind)
    assert set(found) == {"apiVersion", "kind", "metadata", "spec"}
    spec = cluster(name)
    assert set(spec) <= set(CLUSTER_KEYS)
    assert {"rayStartParams", "template"} <= set(spec["headGroupSpec"]) <= set(HEAD_KEYS)
    for group in spec["workerGroupSpecs"]:
        assert (
            {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"} <= set(group) <= set(WORKER_KEYS)
        )
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    if kind == "RayJob":
        assert set(found["spec"]) <= set(JOB_KEYS)


@pytest.mark.parametrize("name", PODS)
def test_parameters_of_ray_start_are_text_and_the_version_is_the_pinned_one(cluster, pinned, name):
    spec = cluster(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        # careful: the operator's API has a map of strings here, and a bare number is refused
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert spec["rayVersion"] == pinned["ray"]


@pytest.mark.parametrize("name", PODS)
def test_parameters_of_ray_start_are_options_it_has(cluster, name):
    from ray.scripts.scripts import start

    known = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
    spec = cluster(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert set(group["rayStartParams"]) <= known


@pytest.mark.parametrize("name", PODS)
def test_workers_have_a_gpu_and_the_shared_folder_and_no_pod_has_privileges(pods, name):
    head, worker = pods(name)
    assert worker["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in head["spec"]["containers"][0]["resources"]["limits"]
    for template in (head, worker):
        (container,) = template["spec"]["containers"]
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        # Ray sizes itself by the container's limits; requests below them would let it promise what is not there
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}
        assert "shared" in mounted


def test_the_job_runs_scsae_and_takes_its_cluster_down_afterwards(manifest, pods):
    spec = manifest("kuberay/ray-job.yaml")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    words = spec["entrypoint"].split()
    mounts = {mount["mountPath"] for mount in pods("ray-job.yaml")[0]["spec"]["containers"][0]["volumeMounts"]}
    assert words[:2] == ["scsae", "run"]
    assert words[2].startswith("/recipe/")
    assert {"/recipe", "/shared"} <= mounts


def test_the_volume_that_pods_ask_for_is_the_one_that_is_made(manifest, pods):
    name = manifest("kuberay/store-pvc.yaml")["metadata"]["name"]
    for file in PODS:
        for template in pods(file):
            claims = [v["persistentVolumeClaim"] for v in template["spec"]["volumes"] if "persistentVolumeClaim" in v]
            assert claims == [{"claimName": name}]


def test_no_manifest_holds_a_secret(root):
    for path in (root / "infra" / "kuberay").glob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            assert document["kind"] != "Secret"
