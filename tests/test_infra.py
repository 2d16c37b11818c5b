"""infra/: every manifest is valid, safe as it stands, and speaks the commands and settings that there are.

KubeRay's kinds are checked against its CRDs, in the folder that GRADINE_KUBERAY_CRDS names (ray.io_rayclusters.yaml and
so on, from KubeRay's releases); Kubernetes' own against their published schemas; `ray up`'s file by Ray. Nothing here
has a cluster, a container engine or Slurm: what stands in for them says so.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from gradine import __version__
from gradine.configs.schema import Cluster, UserError, load
from gradine.pipeline.__main__ import app

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
MANIFESTS = {f"{file.stem}:{manifest['kind']}": manifest for file in sorted((INFRA / "kubernetes").glob("*.yaml"))
             for manifest in yaml.safe_load_all(file.read_text())}
KUBERAY = {name: manifest for name, manifest in MANIFESTS.items() if manifest["apiVersion"] == "ray.io/v1"}
CORE = {name: manifest for name, manifest in MANIFESTS.items() if name not in KUBERAY}
KUBERNETES = "1.30"  # an old one that clusters still run
SCRIPTS = sorted(INFRA.glob("*.sh"))
FREE = {"labels", "annotations", "matchLabels", "clusterSelector", "rayStartParams", "requests", "limits"}  # any key
Path_ = tuple[Any, ...]


# What a schema says of each kind

def closed(schema: Any) -> Any:
    """A CRD's schema that refuses keys it does not list; the API server would drop them without a word."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    shut = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema and not schema.get(
            "x-kubernetes-preserve-unknown-fields"):
        shut["additionalProperties"] = False
    return shut


@pytest.fixture(scope="module")
def crds() -> dict[str, Any]:
    folder = os.environ.get("GRADINE_KUBERAY_CRDS")
    if not folder:
        pytest.skip("GRADINE_KUBERAY_CRDS names no folder with KubeRay's CRDs")
    found = {}
    for file in Path(folder).glob("ray.io_*.yaml"):
        crd = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)
        version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
        found[crd["spec"]["names"]["kind"]] = jsonschema.Draft202012Validator(
            closed(version["schema"]["openAPIV3Schema"]))
    return found


def check_kuberay(crds: dict[str, Any], manifest: dict[str, Any]) -> None:
    crds[manifest["kind"]].validate(manifest)
    check_core({"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]})  # a CRD leaves it open


def check_core(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def accepted(check: Callable[..., None], *arguments: Any) -> bool:
    try:
        check(*arguments)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError, ValueError, KeyError,
            click.ClickException):
        return False
    return True


def keys(tree: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The path of every key, but for those that a user may choose."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if isinstance(tree, dict) and (not path or path[-1] not in FREE) and "gradine_run" not in tree:
            yield (*path, key)
        yield from keys(value, (*path, key))


def misspelt(manifest: dict[str, Any], path: Path_) -> dict[str, Any]:
    changed = copy.deepcopy(manifest)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[f"{path[-1]}s"] = at.pop(path[-1])
    return changed


@pytest.mark.parametrize("name", KUBERAY)
def test_a_kuberay_manifest_fits_its_crd(name: str, crds: dict[str, Any]) -> None:
    check_kuberay(crds, KUBERAY[name])


@pytest.mark.parametrize("name", KUBERAY)
def test_a_key_misspelt_at_any_depth_of_a_kuberay_manifest_is_refused(name: str, crds: dict[str, Any]) -> None:
    paths = [path for path in keys(KUBERAY[name]) if path[0] not in ("apiVersion", "kind")]
    assert max(map(len, paths)) > (9 if name != "job:RayJob" else 6)
    assert [path for path in paths if accepted(check_kuberay, crds, misspelt(KUBERAY[name], path))] == []


@pytest.mark.parametrize("name", CORE)
def test_a_kubernetes_manifest_fits_its_schema_and_a_misspelt_key_does_not(name: str) -> None:
    check_core(CORE[name])
    paths = [path for path in keys(CORE[name]) if path[0] not in ("apiVersion", "kind")]
    assert len(paths) > 5
    assert [path for path in paths if accepted(check_core, misspelt(CORE[name], path))] == []


def test_the_kinds_an_operator_needs_are_there() -> None:
    assert {manifest["kind"] for manifest in MANIFESTS.values()} == {
        "RayCluster", "RayJob", "RayCronJob", "CronJob", "NetworkPolicy", "PersistentVolumeClaim"}


def test_ray_accepts_the_file_of_ray_up_and_refuses_a_misspelt_one() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((INFRA / "ray-cluster.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_start_ray_commands"] == config["head_start_ray_commands"]  # or Ray's defaults run
    assert prepared["worker_start_ray_commands"] == config["worker_start_ray_commands"]
    paths = [path for path in keys(config) if path[0] != "file_mounts"]  # its keys are paths

    def check(changed: dict[str, Any]) -> None:
        validate_config(prepare_config(changed))

    assert [path for path in paths if accepted(check, misspelt(config, path))] == []


def test_ray_up_hands_over_the_token_and_never_logs_in_as_root() -> None:
    config = yaml.safe_load((INFRA / "ray-cluster.yaml").read_text())
    assert config["auth"]["ssh_user"] != "root"
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    for kind, script in (("head", "head.sh"), ("worker", "worker.sh")):
        start = config[f"{kind}_start_ray_commands"][0]
        assert script in start
        assert "RAY_AUTH_MODE=token" in start


# What must hold of all of them

def pods() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(manifest, metadata, spec) of every pod that a manifest makes."""
    def found(name: str, tree: Any) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
            if isinstance(value, dict) and "containers" in value.get("spec", {}):
                yield name, value["metadata"], value["spec"]
            yield from found(name, value)
    return [pod for name, manifest in MANIFESTS.items() for pod in found(name, manifest)]


def clusters() -> list[dict[str, Any]]:
    return [MANIFESTS["cluster:RayCluster"]["spec"],
            MANIFESTS["nightly:RayCronJob"]["spec"]["jobTemplate"]["rayClusterSpec"]]


def jobs() -> list[dict[str, Any]]:
    return [MANIFESTS["job:RayJob"]["spec"], MANIFESTS["nightly:RayCronJob"]["spec"]["jobTemplate"]]


def test_no_pod_runs_as_root_or_may_become_it() -> None:
    assert len(pods()) == 7  # head and worker twice, two submitters, the CronJob's
    for name, _, spec in pods():
        user = spec["securityContext"]
        assert user["runAsNonRoot"] is True, name
        assert user["runAsUser"] > 0, name
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        for container in spec["containers"]:
            assert container["securityContext"] == {"allowPrivilegeEscalation": False,
                                                    "capabilities": {"drop": ["ALL"]}}, name


def test_the_image_runs_as_the_manifests_user_and_has_their_name_and_rays_version() -> None:
    text = (INFRA / "Dockerfile").read_text()
    (user,) = re.findall(r"^USER (\d+):\d+$", text, re.M)
    assert f"useradd --uid {user} " in text
    assert {spec["securityContext"]["runAsUser"] for _, _, spec in pods()} == {int(user)}
    images = {container["image"] for _, _, spec in pods() for container in spec["containers"]}
    assert images == {f"gradine:{__version__}"}
    named = {word for file in (INFRA / "Dockerfile", INFRA / "README.md")
             for word in re.findall(r"(?<![\w/-])gradine:\d[\w.]*", file.read_text())}
    assert named == images
    (ray,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints-cpu.txt").read_text(), re.M)
    assert {spec["rayVersion"] for spec in clusters()} == {ray}


def test_every_cluster_and_every_client_uses_the_one_token_and_none_is_written_down() -> None:
    for spec in clusters():
        assert spec["authOptions"] == {"mode": "token", "secretName": "gradine-token"}
    (client,) = next(spec for name, _, spec in pods() if name == "nightly-cronjob:CronJob")["containers"]
    environment = {variable["name"]: variable for variable in client["env"]}
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "gradine-token", "key": "auth_token"}
    assert "kubectl create secret generic gradine-token --from-literal=auth_token=" in (INFRA / "README.md").read_text()
    assert not [name for name, manifest in MANIFESTS.items() if manifest["kind"] == "Secret"]


def test_nothing_in_infra_turns_the_token_off_or_opens_the_dashboard() -> None:
    for file in (*INFRA.glob("*"), *(INFRA / "kubernetes").glob("*")):
        if file.is_file() and file.name != "node.sh":  # which refuses it beyond loopback, as tests/test_nodes.py shows
            text = file.read_text()
            for opened in ("RAY_AUTH_MODE=disabled", "mode: disabled", "trust_network", "GRADINE_TRUST_NETWORK=1",
                           "0.0.0.0", "--dashboard-host=0", "dashboard-host:"):
                assert opened not in text, f"{file.name}: {opened}"
    assert "--dashboard-host=${GRADINE_DASHBOARD_HOST:-127.0.0.1}" in (INFRA / "head.sh").read_text()


def test_a_pod_that_goes_and_a_job_that_is_stopped_have_time_for_a_checkpoint() -> None:
    grace = Cluster().grace_s
    for name, _, spec in pods():
        assert spec["terminationGracePeriodSeconds"] > grace, name
    for _, _, spec in (pod for pod in pods() if pod[2]["containers"][0]["name"] in ("ray-head", "ray-worker")):
        script, seconds = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert script == "/opt/gradine/infra/drain.sh"
        assert os.access(INFRA / "drain.sh", os.X_OK)
        assert grace < int(seconds) < spec["terminationGracePeriodSeconds"]
    for job in jobs():
        variables = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]
        assert float(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > grace
    plain = [block for block in blocks(INFRA / "README.md") if "ray job submit" in block]
    assert plain
    for block in plain:
        (seconds,) = re.findall(r'"RAY_JOB_STOP_WAIT_TIME_S": "(\d+)"', block)
        assert float(seconds) > grace


def test_a_run_that_kubernetes_starts_has_its_name_and_the_time_that_a_new_pod_takes() -> None:
    for job in jobs():  # what no gradine submits has no name in its metadata, unless it is given one
        assert job["metadata"] == {"gradine_run": load("folder").name}
    for words in (*(shlex.split(job["entrypoint"]) for job in jobs()),
                  command_of(MANIFESTS["nightly-cronjob:CronJob"]["spec"])):
        (setting,) = [word for word in words if word.startswith("ray.group_timeout_s=")]
        assert float(setting.partition("=")[2]) > 4 * Cluster().group_timeout_s
    plain = [block for block in blocks(INFRA / "README.md") if "ray job submit" in block]
    for block in plain:
        assert f'--metadata-json \'{{"gradine_run": "{load("folder").name}"}}\'' in block


def test_the_token_arrives_on_a_node_as_its_owners_alone(tmp_path: Path) -> None:
    (line,) = [line.partition("#")[0] for line in (INFRA / "README.md").read_text().splitlines() if "cat >" in line]
    fake(tmp_path / "bin", "ssh", f'cd {tmp_path}/node && umask 022 && exec bash -c "$2"')
    (tmp_path / "node").mkdir()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t" * 64)
    subprocess.run(["bash", "-c", line], check=True, timeout=30,
                   env={"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
    arrived = tmp_path / "node" / ".ray" / "auth_token"
    assert arrived.read_text() == "t" * 64
    assert stat.S_IMODE(arrived.stat().st_mode) == 0o600
    assert stat.S_IMODE(arrived.parent.stat().st_mode) == 0o700


def test_the_code_comes_with_the_job_and_pip_installs_nothing_on_a_node() -> None:
    for job in jobs():
        assert set(yaml.safe_load(job["runtimeEnvYAML"])) == {"working_dir", "env_vars"}
        assert yaml.safe_load(job["runtimeEnvYAML"])["working_dir"] == "/opt/gradine"
    (client,) = next(spec for name, _, spec in pods() if name == "nightly-cronjob:CronJob")["containers"]
    assert client["workingDir"] == "/opt/gradine"
    dockerfile = (INFRA / "Dockerfile").read_text()
    assert "WORKDIR /opt/gradine\n" in dockerfile
    assert "pip uninstall --yes gradine" in dockerfile


def test_the_nights_cluster_is_the_standing_one() -> None:
    standing, nightly = clusters()
    assert nightly == standing
    assert MANIFESTS["job:RayJob"]["spec"]["clusterSelector"] == {
        "ray.io/cluster": MANIFESTS["cluster:RayCluster"]["metadata"]["name"]}


def test_every_night_starts_and_ends_by_one_clock_and_never_twice_at_once() -> None:
    ray, core = MANIFESTS["nightly:RayCronJob"]["spec"], MANIFESTS["nightly-cronjob:CronJob"]["spec"]
    assert core["concurrencyPolicy"] == "Forbid"
    assert core["jobTemplate"]["spec"]["backoffLimit"] == 0
    for night in (ray, core):
        minute, hour, *days = night["schedule"].split()
        assert days == ["*", "*", "*"]
        for spec in clusters():
            head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
            assert {"name": "TZ", "value": night["timeZone"]} in head["env"]
    (client,) = core["jobTemplate"]["spec"]["template"]["spec"]["containers"]  # whose clock `submit` sends along
    assert {"name": "TZ", "value": core["timeZone"]} in client["env"]
    until = re.search(r"--until (\d\d):(\d\d)", ray["jobTemplate"]["entrypoint"])
    assert until
    hours = (int(until[1]) - int(ray["schedule"].split()[1])) % 24
    assert ray["jobTemplate"]["activeDeadlineSeconds"] > hours * 3600
    assert f"--until={until[1]}:{until[2]}" in command_of(core)


def command_of(cronjob: dict[str, Any]) -> list[str]:
    return cronjob["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["command"]


def test_only_the_cluster_reaches_all_its_ports_and_clients_the_dashboard() -> None:
    policy = MANIFESTS["network-policy:NetworkPolicy"]["spec"]
    own = policy["podSelector"]["matchLabels"]
    assert policy["policyTypes"] == ["Ingress"]
    for rule in policy["ingress"]:
        assert rule["from"]  # without it: from anywhere
        if "ports" not in rule:
            assert rule["from"] == [{"podSelector": {"matchLabels": own}}]
        else:
            assert [port["port"] for port in rule["ports"]] == [8265]
            assert all(source["podSelector"]["matchLabels"] for source in rule["from"])
    for _, metadata, spec in pods():
        ray = spec["containers"][0]["name"] in ("ray-head", "ray-worker")
        assert metadata["labels"] == (own if ray else {"gradine-client": "true"})


def test_the_image_sets_what_the_start_scripts_set() -> None:
    image = dict(re.findall(r"(\w+)=([\w,]+)", (INFRA / "Dockerfile").read_text().partition("\nENV ")[2]))
    node = (INFRA / "node.sh").read_text()
    shared = dict(re.findall(r"^export (\w+)=(?:\$\{\w+:-)?(\w+)\}?", node, re.M))
    assert len(shared) >= 8
    assert {name: image.get(name) for name in shared} == shared


def test_the_dependencies_can_be_installed_from_what_the_image_copies_first(tmp_path: Path) -> None:
    before, _, after = (INFRA / "Dockerfile").read_text().partition("\nRUN pip install")
    for line in re.findall(r"^COPY (.+)$", before, re.M):
        *sources, target = line.split()
        for source in sources:
            (tmp_path / target).mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, tmp_path / target)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in (project["readme"], *project["license-files"], "gradine/__init__.py"):  # the version is in the last
        assert (tmp_path / name).is_file()
    asked = {name for text in (after, (INFRA / "ray-cluster.yaml").read_text(), (INFRA / "README.md").read_text())
             for group in re.findall(r"(?:\.|gradine)\[([a-z0-9,]+)\]", text) for name in group.split(",")}
    assert asked <= set(project["optional-dependencies"])
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-build-isolation",
                           "--quiet", "--no-index", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# Commands and settings

def blocks(page: Path) -> list[str]:
    """The indented blocks of a page, continued lines joined."""
    found = re.findall(r"(?:^    .*\n)+", page.read_text(), re.M)
    return [re.sub(r"\\\n\s*", " ", block) for block in found]


def commands() -> list[tuple[str, list[str]]]:
    """(where, words after `gradine`) of every gradine command that infra/ shows or runs."""
    readme = (INFRA / "README.md").read_text()
    texts = [("job", jobs()[0]["entrypoint"]), ("nightly", jobs()[1]["entrypoint"]),
             ("nightly-cronjob", shlex.join(command_of(MANIFESTS["nightly-cronjob:CronJob"]["spec"])))]
    texts += [("README.md", line.strip()) for block in blocks(INFRA / "README.md") for line in block.splitlines()]
    texts += [("README.md", span) for span in re.findall(r"`(gradine \w+ [^`]+)`", readme)]
    for file in (*SCRIPTS, INFRA / "crontab", INFRA / "ray-cluster.yaml"):
        texts += [(file.name, line) for line in re.sub(r"\\\n\s*", " ", file.read_text()).splitlines()]
    found = []
    for where, text in texts:
        for match in re.finditer(r"(?:^|[\s/])(?:gradine|-m gradine\.pipeline) +([a-z]+\b[^`|>&#;]*)", text):
            if not text.lstrip().startswith("#") or where == "crontab":
                found.append((where, [word for word in shlex.split(match[1]) if word != "$@"]))
    return found


COMMANDS = commands()


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters of a command, or click's error for what there is not; nothing is run."""
    group = typer.main.get_command(app)
    context = group.make_context("gradine", [*words])
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    return command.make_context(name, rest).params


def test_the_commands_of_all_ways_to_run_are_found() -> None:
    assert {"job", "nightly", "nightly-cronjob", "README.md", "crontab", "slurm.sh"} <= {where for where, _ in COMMANDS}
    assert {"run", "submit", "status", "logs", "stop", "plan"} <= {words[0] for _, words in COMMANDS}


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[f"{where}-{' '.join(words)}" for where, words in COMMANDS])
def test_a_command_shown_in_infra_exists_with_its_options_and_settings(where: str, words: list[str]) -> None:
    if where == "slurm.sh":
        words = [*words, "folder"]
    parameters = parsed(words)
    for settings in filter(None, (parameters.get("settings"),)):
        load("folder", settings)  # the template that mine.yaml is a copy of


def test_an_invented_option_or_setting_is_refused() -> None:
    parsed(["run", "folder", "--dry-run"])
    for words in (["run", "folder", "--no-such-option"], ["start", "folder"], ["run"]):
        with pytest.raises(Exception, match="(?i)no such|missing"):
            parsed(words)
    with pytest.raises(UserError, match="shard"):
        load("folder", ["data.shard=/data/shards"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_valid_and_may_be_run(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert script.read_text().startswith("#!/usr/bin/env bash\n") == os.access(script, os.X_OK)  # node.sh is sourced
    assert not re.search(r"\bray stop\b(?! *`|,)", re.sub(r"#.*", "", script.read_text()))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR", script],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


# slurm.sh and drain.sh, run

def fake(folder: Path, name: str, body: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """An allocation of two nodes without Slurm, Ray or gradine: stand-ins that note how they are called."""
    with socket.socket() as head:
        for port in range(20_000, 40_000):
            try:
                head.bind(("127.0.0.1", port))
                break
            except OSError:
                continue
        head.listen()
        note = f'echo "$0 $*" >> {tmp_path}/calls'
        fake(tmp_path / "bin", "scontrol", f"{note}; echo localhost; echo other")
        fake(tmp_path / "bin", "srun", f'{note}; while [[ $1 == -* ]]; do shift; done; exec "$@"')
        for node in ("head.sh", "worker.sh"):
            fake(tmp_path / "infra", node, f"{note}; echo $$ >> {tmp_path}/pids; exec sleep 600")
        fake(tmp_path / "bin", "python", f'''{note}; env > {tmp_path}/environment
            while [[ $(wc -l < {tmp_path}/pids) -lt 2 ]]; do sleep 0.1; done  # all nodes are there
            [[ $1 != - ]] || exit 0
            trap 'sleep 1; echo saved > {tmp_path}/checkpoint; exit 143' TERM
            echo > {tmp_path}/training; [[ $* != *folder* ]] || exit 7
            while :; do sleep 0.1; done''')
        environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
                       "SLURM_JOB_ID": str(port - 20_000), "SLURM_JOB_NODELIST": "localhost,other"}
        environment.pop("RAY_AUTH_TOKEN", None)
        yield {"command": ["bash", str(INFRA / "slurm.sh")], "environment": environment, "folder": tmp_path,
               "token": tmp_path / "slurm" / str(port - 20_000) / "token"}


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_slurm_job_ends_with_the_runs_exit_code_and_keeps_its_token_to_itself(slurm: dict[str, Any]) -> None:
    done = subprocess.run([*slurm["command"], "folder", "runs=/shared/runs"], env=slurm["environment"], timeout=60,
                          capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert stat.S_IMODE(slurm["token"].stat().st_mode) == 0o600
    token = slurm["token"].read_text()
    assert len(token) == 64
    calls, environment = (slurm["folder"] / "calls").read_text(), (slurm["folder"] / "environment").read_text()
    assert token not in calls + environment + done.stdout + done.stderr
    assert f"RAY_AUTH_TOKEN_PATH={slurm['token']}\n" in environment
    assert "RAY_AUTH_MODE=token\n" in environment
    assert "python -m gradine.pipeline run folder runs=/shared/runs\n" in calls
    assert calls.count("--mpi=none") == 2  # or Accelerate reads Slurm's PMI_SIZE in every worker
    assert calls.count("head.sh") == 2  # srun's words, and its own
    assert calls.count("worker.sh") == 2
    assert len((slurm["folder"] / "pids").read_text().split()) == 2
    assert all(gone(int(pid)) for pid in (slurm["folder"] / "pids").read_text().split())


def test_slurms_notice_reaches_the_run_which_ends_with_its_checkpoint(slurm: dict[str, Any]) -> None:
    job = subprocess.Popen([*slurm["command"], "mine.yaml"], env=slurm["environment"])
    until = time.monotonic() + 60
    while not (slurm["folder"] / "training").exists() and time.monotonic() < until:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 143
    assert (slurm["folder"] / "checkpoint").read_text() == "saved\n"
    assert all(gone(int(pid)) for pid in (slurm["folder"] / "pids").read_text().split())


DRAINED = """
import os, signal, subprocess, sys, time
folder, drain = sys.argv[1:]
def named(name, *then):  # a process that ps would show by this name
    return subprocess.Popen(["bash", "-c", f"exec -a {name} sleep 600"])
worker, idle = named("ray::Worker.run_stage"), named("ray::IDLE")
def raylet(node, head, user):
    return subprocess.Popen(["/x/raylet", "-c", "sleep 600; :", f"--node_id={node}", f"--gcs-address={head}", "--end"],
                            executable="/bin/bash", user=user)
raylets = raylet("ab12", "10.0.0.1:6379", 0), raylet("cd34", "10.0.0.2:7000", 0), raylet("ef56", "10.0.0.3:1", 65534)
job = subprocess.Popen(["sh", "-c", f"{sys.executable} -m gradine.pipeline run mine.yaml; echo $? > {folder}/code"])
while not os.path.exists(f"{folder}/training"):
    time.sleep(0.05)
while open(f"/proc/{worker.pid}/cmdline").read()[:5] != "ray::":
    time.sleep(0.05)
began = time.monotonic()
subprocess.run(["bash", drain, "30"], check=True)
print(time.monotonic() - began, worker.wait(9), idle.poll(), job.wait(9), open(f"{folder}/code").read().strip())
"""


def test_a_node_that_is_drained_ends_its_training_with_a_checkpoint_and_waits_for_it(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs root and unshare, for a pid namespace without other people's processes")
    package = tmp_path / "path" / "gradine" / "pipeline"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__main__.py").write_text(f"""
import pathlib, signal, sys, time
def save(*_):
    time.sleep(2)
    pathlib.Path({str(tmp_path)!r}, "checkpoint").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path({str(tmp_path)!r}, "training").touch()
time.sleep(600)
""")
    fake(tmp_path / "bin", "ray", f'echo "$*" >> {tmp_path}/ray; [[ $* != *cd34* ]]')
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", DRAINED, str(tmp_path),
         str(INFRA / "drain.sh")], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "path"), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    seconds, worker, idle, job, code = done.stdout.split()
    assert (worker, idle, job, code) == (str(-signal.SIGTERM), "None", "0", "143")
    assert 2 <= float(seconds) < 29  # the driver's save, and not all of the 30 s it may take
    assert (tmp_path / "checkpoint").exists()
    asked = [line.split() for line in sorted((tmp_path / "ray").read_text().splitlines())]
    assert [words[:5] for words in asked] == [  # each by its own head; another user's Ray is left alone
        ["drain-node", "--address", "10.0.0.1:6379", "--node-id", "ab12"],
        ["drain-node", "--address", "10.0.0.2:7000", "--node-id", "cd34"]]
    assert done.stderr.splitlines() == [
        "drain.sh: the head at 10.0.0.2:7000 did not take this node out; Ray may start more here"]


# node.sh and worker.sh, run

NODE = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t", "GRADINE_RESTART_S": "0"}


@pytest.mark.parametrize("code", [0, 7])
def test_a_command_that_ends_at_once_is_told_with_its_own_exit_code(code: int) -> None:
    slow = 'kill() { sleep 0.2; builtin kill "$@"; }'  # the shell has taken note of the end before it looks
    done = subprocess.run(["bash", "-c", f"source {INFRA}/node.sh; {slow}; run bash -c 'exit {code}'"], env=NODE,
                          timeout=30)
    assert done.returncode == code


def test_a_worker_finds_a_head_whose_address_is_of_ipv6(tmp_path: Path) -> None:
    try:
        head = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with head:
        fake(tmp_path / "bin", "ray", f'echo "$*" > {tmp_path}/ray; kill -TERM $PPID')
        address = f"[::1]:{head.getsockname()[1]}"
        done = subprocess.run([INFRA / "worker.sh"], capture_output=True, text=True, timeout=30, env={
            **NODE, "GRADINE_HEAD": address, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
    assert "no head at" not in done.stderr
    assert f"--address={address} " in (tmp_path / "ray").read_text()
