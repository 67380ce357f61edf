//! How a process of the fleet starts, answers a health check and stops: the same for worker and gateway.
//!
//! Faults of the configuration end with exit code 2 and every other failure with 1, both with a line on
//! standard error that says what to change, because nobody may be reading logs yet.

use std::{fmt, future::Future, process::ExitCode};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{Config, Env, config::Process, ops, telemetry};

/// What a process is, and what its command line asked for.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Its binary's name, in messages.
    pub name: &'static str,
    /// Which settings it needs.
    pub process: Process,
    /// Ask the running process whether it is ready, and exit.
    pub healthcheck: bool,
    /// Check the configuration, and exit.
    pub check_config: bool,
}

/// Why a process ended other than well.
#[derive(Debug)]
pub struct Failure {
    message: String,
    code: u8,
}

impl Failure {
    /// Exit code 1: it was tried and failed.
    pub fn failed(error: impl fmt::Display) -> Self {
        Self { message: error.to_string(), code: 1 }
    }

    /// Exit code 2: the configuration is wrong.
    pub fn misconfigured(error: impl fmt::Display) -> Self {
        Self { message: error.to_string(), code: 2 }
    }
}

/// Reads the configuration, does what the command line asked for, and otherwise `work`s.
pub async fn run<W, F>(start: Start, work: W) -> ExitCode
where
    W: FnOnce(Config) -> F,
    F: Future<Output = Result<(), Failure>>,
{
    let Start { name, process, healthcheck, check_config } = start;
    let config = match Config::load(&Env::process(), process) {
        Ok(config) => config,
        Err(errors) => {
            eprintln!("{name}: {errors}");
            return ExitCode::from(2);
        }
    };
    if check_config {
        println!("The configuration is valid.");
        return ExitCode::SUCCESS;
    }
    if healthcheck {
        let listen = match process {
            Process::Gateway => config.gateway.listen,
            Process::Worker | Process::Cli => config.worker.listen,
        };
        return match ops::probe_ready(listen).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(why) => {
                eprintln!("{name} is not ready: {why}");
                ExitCode::FAILURE
            }
        };
    }
    if let Err(errors) = telemetry::init(&config.log) {
        eprintln!("{name}: {errors}");
        return ExitCode::from(2);
    }
    match work(config).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { message, code }) => {
            tracing::error!(
                process = name,
                error = message,
                error_code = "process_failed",
                "the process failed"
            );
            eprintln!("{name}: {message}");
            ExitCode::from(code)
        }
    }
}

/// Starts a service, waits for SIGTERM or SIGINT, and stops it. A signal during the start ends it at
/// once; a second one while it stops ends it without waiting, which is an error.
pub async fn serve<S, Stop>(
    start: impl Future<Output = Result<S, Failure>>,
    stop: impl FnOnce(S) -> Stop,
) -> Result<(), Failure>
where
    Stop: Future<Output = ()>,
{
    let mut signals = Signals::new().map_err(Failure::failed)?;
    let service = tokio::select! {
        started = start => started?,
        () = signals.next() => return Ok(()),
    };
    signals.next().await;
    tokio::select! {
        () = stop(service) => Ok(()),
        () = signals.next() => Err(Failure::failed("second signal: exiting with work under way")),
    }
}

/// The signals that ask a process to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
