//! `dnpipes`: parses, sets up the log, runs, and turns the outcome into an exit code.

use std::process::ExitCode;

use clap::Parser;
use dnpipes::cli::Cli;
use dnpipes::run::{Outcome, logging, run};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match logging::start().and_then(|()| run(cli.command)) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::GotNothing) => ExitCode::from(3),
        Err(error) => {
            eprintln!("dnpipes: {error}");
            ExitCode::from(if error.is_usage() { 2 } else { 1 })
        }
    }
}
