//! `dnpipes`: parses, sets up the log, runs, and turns the outcome into an exit code.

use std::io::{self, Write};
use std::process::ExitCode;

use dnpipes::cli::Cli;
use dnpipes::run::{Outcome, logging, run};

fn main() -> ExitCode {
    let cli = Cli::of_this_program();
    settle();
    let outcome = logging::start().and_then(|()| run(cli.command));
    match outcome {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::GotNothing) => ExitCode::from(3),
        Err(error) => {
            // Where that takes nothing, the exit code is what is left to say.
            writeln!(io::stderr(), "dnpipes: {error}").ok();
            logging::also_to_the_system(&error.to_string());
            ExitCode::from(if error.is_usage() { 2 } else { 1 })
        }
    }
}

/// Blocks of memory, in bytes, that go back to the system at once when they are freed. Requests of the kernel are smaller.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 4 << 20;

/// What concerns the whole process.
fn settle() {
    // A file that grows over the limit (ulimit -f) is an error, as one on a full disk is, and not the end.
    // SAFETY: a signal that exists, and no handler of ours.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    // Where whoever started it ignores the end of his own children, those of this program could not be waited for.
    // SAFETY: as above.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    // By itself malloc(3) comes to keep blocks as large as the largest that was ever freed, in an arena for each thread:
    // some hundred MiB, behind a few messages of 16 MiB.
    // SAFETY: settings that exist, and sizes in their range.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        // It would be 128 KiB from now on: what one request has used would go back, and come again for the next one.
        libc::mallopt(libc::M_TRIM_THRESHOLD, 2 * LARGE);
    }
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        told(panic);
        logging::also_to_the_system(&panic.to_string());
        // As where no thread can be started: what is half made would wait for itself.
        if std::thread::current().name() == Some("main") {
            std::process::exit(101);
        }
    }));
}
