//! The log: to standard error, as much as `DNPIPES_LOG` says.

use env_logger::Logger;
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::error::{Error, Kind, Result};
use crate::fs::session;

struct Filtered(Logger);

/// What fails in a crate is an error here, and is told of once.
const USUAL: &str = "error,dnpipes=warn,fuser=warn";

/// Starts the log.
///
/// # Errors
/// `InvalidInput` where `DNPIPES_LOG` makes no sense.
pub fn start() -> Result<()> {
    let wanted = std::env::var("DNPIPES_LOG").unwrap_or_default();
    let wanted = if wanted.is_empty() { USUAL } else { &wanted };
    check(wanted)?;
    let logger = env_logger::Builder::new().parse_filters(wanted).build();
    log::set_max_level(logger.filter());
    if log::set_boxed_logger(Box::new(Filtered(logger))).is_err() {
        log::error!("the log was started twice");
    }
    Ok(())
}

/// Refuses what the log would take for the name of a module, and be silent.
fn check(wanted: &str) -> Result<()> {
    // What stands behind a slash is a pattern for the text.
    let words = wanted.split('/').next().unwrap_or_default();
    for word in words.split(',') {
        let level = word.rsplit('=').next().unwrap_or_default();
        if level.parse::<LevelFilter>().is_err() {
            let why = format!(
                "DNPIPES_LOG: {word:?} is not off, error, warn, info, debug or trace, nor module=level"
            );
            return Err(Error::new(Kind::InvalidInput, why).usage());
        }
    }
    Ok(())
}

impl Log for Filtered {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !session::is_late_answer(record) {
            return self.0.log(record);
        }
        let everyday = Record::builder()
            .args(*record.args())
            .target(record.target())
            .level(Level::Debug)
            .build();
        self.0.log(&everyday);
    }

    fn flush(&self) {
        self.0.flush();
    }
}
