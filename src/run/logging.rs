//! The log: to standard error, as much as `DNPIPES_LOG` says.

use env_logger::{Env, Logger};
use log::{Level, Log, Metadata, Record};

use crate::fs::session;

struct Filtered(Logger);

/// Starts the log.
pub fn start() {
    // What fails in a crate is an error here, and is told of once.
    let usual = Env::new().filter_or("DNPIPES_LOG", "error,dnpipes=warn,fuser=warn");
    let logger = env_logger::Builder::from_env(usual).build();
    log::set_max_level(logger.filter());
    if log::set_boxed_logger(Box::new(Filtered(logger))).is_err() {
        log::error!("the log was started twice");
    }
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
