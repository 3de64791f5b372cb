//! The command line. Parsing does nothing else; `run` acts.

use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::TypedValueParser;
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, FromArgMatches, Parser, Subcommand};

use crate::backend::BackendUrl;
use crate::error::{Error, Kind, Result};
use crate::name::PipeName;
use crate::selector::{Frame, Mode, Selector, parse_duration, parse_size};

/// Distributed named pipes as files: `echo msg > topic` pushes, `cat topic` pulls, `truncate -s 0 topic`
/// resets.
#[derive(Debug, Parser)]
#[command(name = "dnpipes", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Mount a directory in which each file is a pipe.
    Mount(Box<MountArgs>),
    /// Offer pipes over HTTP.
    Serve(ServeArgs),
    /// Push messages: each MSG, or without one what standard input holds.
    Push(PushArgs),
    /// Print a pipe's messages.
    Pull(PullArgs),
    /// Drop all messages of a pipe.
    Reset(PipeArgs),
    /// List the pipes.
    Ls(LsArgs),
    /// Remove a pipe for everyone.
    Rm(PipeArgs),
}

/// Where the pipes are.
#[derive(Debug, Args)]
pub struct SourceArgs {
    /// Where the messages live: sqlite:/path/file.db, http[s]://host:port/, redis[s][+srv]://host/,
    /// nats[+srv]://host/ or tls[+srv]://host/ (NATS). Default: the store of this user.
    #[arg(
        long,
        value_name = "URL",
        env = "DNPIPES_SOURCE",
        hide_env_values = true,
        value_parser = SourceParser
    )]
    pub source: Option<BackendUrl>,
}

impl Cli {
    /// The program's arguments; ends the program for what they make impossible, and after help.
    pub fn of_this_program() -> Self {
        Cli::try_parse().unwrap_or_else(|refusal| {
            let said = refusal.to_string();
            let shown = hidden(&said);
            if refusal.use_stderr() && shown != said {
                // A source in another argument's place.
                eprint!("{shown}");
                std::process::exit(refusal.exit_code());
            }
            refusal.exit()
        })
    }
}

/// What clap says, without what may be secret in it: arguments that look like sources, which it quotes.
fn hidden(text: &str) -> String {
    let mut shown = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['\'', '"']) {
        let (before, quoted) = rest.split_at(at + 1);
        let Some(end) = quoted.find(&before[at..]) else {
            break;
        };
        shown += before;
        shown += &match quoted[..end].split_once(':') {
            Some((scheme, secret)) if secret.contains(['@', ':']) && !secret.contains("…@") => {
                format!("{scheme}:…")
            }
            _ => quoted[..end].to_owned(),
        };
        shown += &before[at..];
        rest = &quoted[end + 1..];
    }
    shown + rest
}

/// Takes a source's URL. What clap says by itself of a value that is refused shows the value, and with it a password.
#[derive(Clone)]
struct SourceParser;

impl TypedValueParser for SourceParser {
    type Value = BackendUrl;

    fn parse_ref(
        &self,
        command: &clap::Command,
        _argument: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<BackendUrl, clap::Error> {
        source(value).map_err(|why| {
            clap::Error::raw(ErrorKind::ValueValidation, why).format(&mut command.clone())
        })
    }
}

/// Parses a source's URL; what is wrong with it is said without what may be a secret.
fn source(text: &OsStr) -> Result<BackendUrl, String> {
    match text.to_str() {
        Some("") => Err("the source is empty; is DNPIPES_SOURCE?".to_owned()),
        Some(text) => text.parse().map_err(|error: Error| error.to_string()),
        None => Err("the source is not UTF-8".to_owned()),
    }
}

const MOUNT_USAGE: &str = "dnpipes mount [OPTIONS] [SOURCE] <MOUNTPOINT>";

/// `dnpipes mount`.
#[derive(Debug, Clone, Args)]
#[command(override_usage = MOUNT_USAGE)]
pub struct MountArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub place: PlaceArgs,
    /// Go to the background; returns once the mount answers.
    #[arg(long, env = "DNPIPES_DAEMON", value_parser = switch)]
    pub daemon: bool,
    /// What a read does at the end of the log: drain, follow or snapshot.
    #[arg(long, default_value = "drain", env = "DNPIPES_MODE")]
    pub mode: Mode,
    /// How bytes map to messages: line, nul, file or len.
    #[arg(long, default_value = "line", env = "DNPIPES_FRAME")]
    pub frame: Frame,
    /// How long to retry an unreachable backend, as 30s or 5m; 0 for ever.
    #[arg(long, value_name = "TIME", default_value = "30s", env = "DNPIPES_TIMEOUT", value_parser = timeout)]
    pub timeout: Timeout,
    /// Longest message, in bytes or with KiB, MiB, GiB; less than 4GiB.
    #[arg(long, value_name = "SIZE", default_value = "16MiB", env = "DNPIPES_MAX_MESSAGE_SIZE", value_parser = size)]
    pub max_message_size: usize,
    /// Let rm remove a pipe, for everyone.
    #[arg(long, env = "DNPIPES_ALLOW_DELETE", value_parser = switch)]
    pub allow_delete: bool,
    /// Refuse pushes, resets and new pipes.
    #[arg(long, env = "DNPIPES_READ_ONLY", value_parser = switch)]
    pub read_only: bool,
    /// Let other users use the mount, as far as the files' permissions let them.
    #[arg(long, env = "DNPIPES_ALLOW_OTHER", value_parser = switch)]
    pub allow_other: bool,
    /// Owner of the files, as a number. Default: who mounts.
    #[arg(long, env = "DNPIPES_UID", value_parser = id)]
    pub uid: Option<u32>,
    /// Group of the files, as a number. Default: the group of who mounts.
    #[arg(long, env = "DNPIPES_GID", value_parser = id)]
    pub gid: Option<u32>,
    /// Permissions of the files, in octal.
    #[arg(long, value_name = "MODE", default_value = "644", env = "DNPIPES_FILE_MODE", value_parser = file_mode)]
    pub file_mode: u16,
    /// Options as mount(8) gives them: the flags' names with _ for -, as ro,allow_other,mode=follow. They
    /// override the flags.
    #[arg(short = 'o', value_name = "OPT,…", env = "DNPIPES_OPTIONS")]
    pub options: Vec<String>,
}

/// `dnpipes serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Where the messages live, as for mount.
    #[arg(value_name = "SOURCE", env = "DNPIPES_SOURCE", hide_env_values = true, value_parser = SourceParser)]
    pub source: Option<BackendUrl>,
    /// Where to listen. Any other than a loopback address needs --token-file, --tls-client-ca or --insecure.
    #[arg(
        long,
        value_name = "ADDRESS:PORT",
        default_value = "127.0.0.1:7070",
        env = "DNPIPES_LISTEN",
        value_parser = address
    )]
    pub listen: SocketAddr,
    /// Who may do what: on each line a token, then full, read or push, then a prefix of the pipes' names.
    /// Read again on SIGHUP.
    #[arg(long, value_name = "FILE", env = "DNPIPES_SERVE_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    /// The certificate chain for TLS, in PEM. Read again on SIGHUP.
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_key",
        env = "DNPIPES_TLS_CERT"
    )]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key, in PEM.
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_cert",
        env = "DNPIPES_TLS_KEY"
    )]
    pub tls_key: Option<PathBuf>,
    /// Authorities, in PEM: only clients with a certificate of theirs are let in.
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_cert",
        env = "DNPIPES_TLS_CLIENT_CA"
    )]
    pub tls_client_ca: Option<PathBuf>,
    /// Let everybody in who can reach the address.
    #[arg(long, env = "DNPIPES_INSECURE", value_parser = switch)]
    pub insecure: bool,
    /// Connections at a time; more wait.
    #[arg(long, value_name = "N", default_value = "1024", env = "DNPIPES_MAX_CONNECTIONS", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub max_connections: u32,
    /// How long to retry an unreachable backend before a request fails, as 5s; 0 for ever.
    #[arg(long, value_name = "TIME", default_value = "5s", env = "DNPIPES_SERVE_TIMEOUT", value_parser = timeout)]
    pub timeout: Timeout,
}

/// What is mounted where: `[SOURCE] MOUNTPOINT`.
#[derive(Debug, Clone)]
pub struct PlaceArgs {
    /// Where the messages live.
    pub source: Option<BackendUrl>,
    /// The directory.
    pub mountpoint: PathBuf,
}

/// The same as clap can take it: the first word is always there. Its `allow_missing_positional` would miss the
/// source before `--`, and before an option.
#[derive(Args)]
struct PlaceWords {
    /// An empty directory.
    #[arg(value_name = "MOUNTPOINT")]
    mountpoint: OsString,
    /// Where the messages live: memory:, sqlite:/path/file.db[?durability=full|process],
    /// http[s]://host:port/, redis[s][+srv]://host/, nats[+srv]://host/ or tls[+srv]://host/ (NATS).
    /// Default: the store of this user, made on first use.
    #[arg(value_name = "SOURCE", env = "DNPIPES_SOURCE", hide_env_values = true)]
    source: Option<OsString>,
}

impl Args for PlaceArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        PlaceWords::augment_args(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        PlaceWords::augment_args_for_update(command)
    }
}

impl FromArgMatches for PlaceArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let two = matches.value_source("source") == Some(ValueSource::CommandLine);
        let words = PlaceWords::from_arg_matches(matches)?;
        let (source_words, mountpoint) = match words.source {
            Some(second) if two => (Some(words.mountpoint), second),
            first => (first, words.mountpoint),
        };
        let is_url = |text: &str| text.contains("://") || text.parse::<BackendUrl>().is_ok();
        if !two && mountpoint.to_str().is_some_and(is_url) {
            return Err(refuse_places("the mountpoint is missing".to_owned()));
        }
        if mountpoint.is_empty() {
            return Err(refuse_places("the mountpoint is empty".to_owned()));
        }
        let parsed = source_words.as_deref().map(source).transpose();
        Ok(PlaceArgs {
            source: parsed.map_err(|why| {
                refuse_places(match two && source(&mountpoint).is_ok() {
                    true => "the source comes before the mountpoint".to_owned(),
                    false => why,
                })
            })?,
            mountpoint: mountpoint.into(),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

fn refuse_places(why: String) -> clap::Error {
    let mut command = clap::Command::new("mount").override_usage(MOUNT_USAGE);
    clap::Error::raw(ErrorKind::ValueValidation, why).format(&mut command)
}

/// `dnpipes push`.
#[derive(Debug, Args)]
pub struct PushArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub source: SourceArgs,
    /// How standard input maps to messages: line, nul, file or len.
    #[arg(long, default_value = "line", env = "DNPIPES_FRAME")]
    pub frame: Frame,
    /// The pipe; it is made if it does not exist.
    pub topic: Selector,
    /// Messages, pushed together. They may begin with a dash after `--`.
    #[arg(value_name = "MSG")]
    pub messages: Vec<OsString>,
}

/// `dnpipes pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub source: SourceArgs,
    /// How messages map to standard output: line, nul, file or len.
    #[arg(long, default_value = "line", env = "DNPIPES_FRAME")]
    pub frame: Frame,
    /// The pipe, with options as in topic@follow.
    pub topic: Selector,
    /// Stop after so many messages.
    #[arg(short = 'n', value_name = "N", allow_negative_numbers = true)]
    pub count: Option<u64>,
    /// Stop when no message comes for so long, as 5s; 0 does not wait. Exit code 3 if none came at all. A store that
    /// cannot be reached is tried for as long, and at least for 2s; then exit code 1.
    #[arg(long, value_name = "TIME", value_parser = duration, allow_negative_numbers = true)]
    pub timeout: Option<Duration>,
}

/// A command on one pipe.
#[derive(Debug, Args)]
pub struct PipeArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub source: SourceArgs,
    /// The pipe.
    #[arg(value_parser = PipeName::new)]
    pub topic: PipeName,
}

/// `dnpipes ls`.
#[derive(Debug, Args)]
pub struct LsArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub source: SourceArgs,
    /// With the number of messages, their bytes and the time of the last push.
    #[arg(short = 'l')]
    pub long: bool,
}

/// A deadline; `None` is for ever.
pub type Timeout = Option<Duration>;

fn invalid(text: &str, what: &str) -> Error {
    Error::new(Kind::InvalidInput, format!("{text:?} is not {what}"))
}

/// A time as `30s`, `1m 30s`, or a number of seconds.
fn duration(text: &str) -> Result<Duration> {
    parse_duration(text).ok_or_else(|| invalid(text, "a time, as 30s or 5m"))
}

fn timeout(text: &str) -> Result<Timeout> {
    duration(text).map(|time| (!time.is_zero()).then_some(time))
}

/// A size as `4096`, `64KiB`, `16MiB`, `1GiB`. The frame `len` tells a message's length in 32 bits.
fn size(text: &str) -> Result<usize> {
    let bytes = parse_size(text).ok_or_else(|| invalid(text, "a size, as 4096, 64KiB or 16MiB"))?;
    match u32::try_from(bytes) {
        Ok(bytes @ 1..) => Ok(bytes as usize),
        _ => Err(invalid(
            text,
            "a size from 1 byte to 4294967295, which is less than 4GiB",
        )),
    }
}

/// Whether an option is on, as its variable says; an empty one says nothing.
fn switch(text: &str) -> Result<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "" | "0" | "false" | "no" | "off" => Ok(false),
        _ => Err(invalid(text, "yes or no")),
    }
}

/// A user's or a group's number.
fn id(text: &str) -> Result<u32> {
    text.parse()
        .map_err(|_| invalid(text, "a number, as id -u and id -g print it"))
}

fn address(text: &str) -> Result<SocketAddr> {
    text.parse().map_err(|_| {
        invalid(
            text,
            "an IP address and a port, as 127.0.0.1:7070 or [::1]:7070",
        )
    })
}

fn file_mode(text: &str) -> Result<u16> {
    match u16::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(invalid(text, "a mode from 000 to 777")),
    }
}

/// What mount(8) and fstab(5) may pass on that has no meaning here.
const IGNORED: &str = "defaults rw auto noauto user nouser users nousers owner noowner group nogroup \
    nofail _netdev suid nosuid dev nodev exec noexec atime noatime diratime nodiratime relatime norelatime \
    strictatime nostrictatime lazytime nolazytime sync async dirsync silent loud symfollow nosymfollow \
    iversion noiversion mand nomand";

const WITHOUT_VALUE: &str = "ro read_only allow_other allow_delete";
const WITH_VALUE: &str = "mode frame timeout max_message_size uid gid file_mode";

impl MountArgs {
    /// Applies the `-o` options.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] for an unknown option or a bad value.
    pub fn apply_options(&mut self) -> Result<()> {
        for list in std::mem::take(&mut self.options) {
            for option in list.split(',').filter(|option| !option.is_empty()) {
                self.apply(option)?;
            }
        }
        Ok(())
    }

    fn apply(&mut self, option: &str) -> Result<()> {
        let refuse = |why: String| Err(Error::new(Kind::InvalidInput, why));
        let is_among = |words: &str, word| words.split(' ').any(|known| known == word);
        match option.split_once('=').unwrap_or((option, "")) {
            ("ro" | "read_only", "") => self.read_only = true,
            ("allow_other", "") => self.allow_other = true,
            ("allow_delete", "") => self.allow_delete = true,
            (word, "") if is_among(WITH_VALUE, word) => {
                return refuse(format!("-o {word} needs a value, as {word}=…"));
            }
            ("mode", value) => self.mode = value.parse()?,
            ("frame", value) => self.frame = value.parse()?,
            ("timeout", value) => self.timeout = timeout(value)?,
            ("max_message_size", value) => self.max_message_size = size(value)?,
            ("uid", value) => self.uid = Some(id(value)?),
            ("gid", value) => self.gid = Some(id(value)?),
            ("file_mode", value) => self.file_mode = file_mode(value)?,
            (word, "") if is_among(IGNORED, word) => {}
            // mount(8) says which user it was.
            ("comment" | "user", _) => {}
            (word, _) if word.starts_with("x-") || word.starts_with("X-") => {}
            (word, _) if is_among(WITHOUT_VALUE, word) => {
                return refuse(format!("-o {word} takes no value"));
            }
            _ => {
                let word = option.split('=').next().unwrap_or_default();
                return refuse(format!(
                    "{word:?} is not an option of -o; there are: {WITHOUT_VALUE} {WITH_VALUE}"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(args: &[&str]) -> MountArgs {
        let args = ["dnpipes", "mount"].iter().chain(args);
        match Cli::try_parse_from(args).expect("legal").command {
            Command::Mount(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_may_be_a_secret_is_not_shown() {
        let said = "error: 'redis://u:pa ss@host/' is none: \"redis://u:pa ss\"; 'redis:u:word@host', 'topic@follow'";
        let shown = "error: 'redis:…' is none: \"redis:…\"; 'redis:…', 'topic@follow'";
        assert_eq!(hidden(said), shown);
        let hidden_already = "source \"redis://…@h/?…\": unknown key \"x\"";
        assert_eq!(hidden(hidden_already), hidden_already);
        assert_eq!(hidden("no URL @ all"), "no URL @ all");
    }

    #[test]
    fn a_switch_is_on_or_off_and_nothing_between() {
        for (text, on) in [
            ("", false),
            ("off", false),
            ("0", false),
            ("Yes", true),
            ("1", true),
        ] {
            assert_eq!(switch(text).expect("clear"), on, "{text}");
        }
        for text in ["maybe", "disabled", " ", "2"] {
            switch(text).expect_err("unclear");
        }
    }

    #[test]
    fn the_source_may_be_left_out() {
        let place = mount(&["/mnt"]).place;
        assert_eq!((place.source, place.mountpoint), (None, "/mnt".into()));
        let place = mount(&["memory:", "/mnt"]).place;
        assert!(place.source.is_some());
    }

    #[test]
    fn the_places_may_stand_anywhere_among_the_options() {
        for args in [
            &["--", "memory:", "/mnt"][..],
            &["memory:", "--", "/mnt"],
            &["memory:", "/mnt", "--"],
            &["--read-only", "-o", "mode=follow", "--", "memory:", "/mnt"],
            &["memory:", "--read-only", "/mnt"],
            &["memory:", "-o", "ro", "--", "/mnt"],
        ] {
            let args = mount(args);
            assert!(args.place.source.is_some(), "{args:?}");
            assert_eq!(args.place.mountpoint, PathBuf::from("/mnt"), "{args:?}");
        }
        for (args, mountpoint) in [
            (&["--", "/mnt"][..], "/mnt"),
            (&["--read-only", "--", "/mnt"], "/mnt"),
            (&["--", "-dash"], "-dash"),
        ] {
            let args = mount(args);
            assert!(args.place.source.is_none(), "{args:?}");
            assert_eq!(args.place.mountpoint, PathBuf::from(mountpoint), "{args:?}");
        }
        for args in [
            &[][..],
            &["--"],
            &[""],
            &["memory:", ""],
            &["--", "bogus:", "/mnt"],
            &["memory:", "/mnt", "/more"],
            &["memory:", "--", "/mnt", "/more"],
            &["--", "memory:", "/mnt", "/more"],
        ] {
            let parsed = Cli::try_parse_from(["dnpipes", "mount"].iter().chain(args));
            assert_eq!(parsed.expect_err("refused").exit_code(), 2, "{args:?}");
        }
    }

    #[test]
    fn no_secret_is_shown_whatever_is_wrong_with_a_source() {
        let source = "redis://:s3cret@h/?foo";
        for args in [
            &["mount", source, "/mnt"][..],
            &["serve", source],
            &["ls", "--source", source],
            &["push", "--source", source, "topic"],
            &["pull", "topic", "--source", source],
        ] {
            let parsed = Cli::try_parse_from(["dnpipes"].iter().chain(args));
            let why = parsed.expect_err("refused").to_string();
            assert!(why.contains("foo") && !why.contains("s3cret"), "{why}");
        }
        for source in [source, "redis://:s3cret@h/", "memory:"] {
            let parsed = Cli::try_parse_from(["dnpipes", "mount", source]);
            let why = parsed.expect_err("refused").to_string();
            assert!(
                why.contains("the mountpoint is missing") && !why.contains("s3cret"),
                "{why}"
            );
        }
    }

    #[test]
    fn who_mixes_up_the_places_is_told_so() {
        let parsed = Cli::try_parse_from(["dnpipes", "mount", "/mnt", "memory:"]);
        let why = parsed.expect_err("refused").to_string();
        assert!(why.contains("the source comes before"), "{why}");
    }

    #[test]
    fn mount_options_are_the_flags_by_another_name() {
        let mut args = mount(&[
            "memory:",
            "/mnt",
            "-o",
            "ro,allow_other,mode=follow,frame=nul",
            "-o",
            "timeout=0,max_message_size=64KiB,uid=7,gid=8,file_mode=600",
        ]);
        args.apply_options().expect("legal");
        assert!(args.read_only && args.allow_other && !args.allow_delete);
        assert_eq!((args.mode, args.frame), (Mode::Follow, Frame::Nul));
        assert_eq!((args.timeout, args.max_message_size), (None, 65536));
        assert_eq!(
            (args.uid, args.gid, args.file_mode),
            (Some(7), Some(8), 0o600)
        );
    }

    #[test]
    fn what_fstab_may_say_of_any_file_system_changes_nothing() {
        let plain = format!("{:?}", mount(&["memory:", "/mnt"]));
        for option in [
            // What mount(8) passes on to a helper, and what somebody may copy from fstab(5).
            "rw,noexec,nosuid,nodev,user,nofail,_netdev",
            "rw,exec,suid,dev,user=somebody",
            "defaults,auto,noauto,nouser,users,nousers,owner,noowner,group,nogroup",
            "atime,noatime,diratime,nodiratime,relatime,norelatime,strictatime,nostrictatime",
            "sync,async,dirsync,lazytime,nolazytime,silent,loud,symfollow,nosymfollow",
            "iversion,noiversion,mand,nomand,x-systemd.automount,X-mount.mkdir,comment=words",
        ] {
            let mut args = mount(&["memory:", "/mnt", "-o", option]);
            args.apply_options().expect(option);
            assert_eq!(format!("{args:?}"), plain, "{option}");
        }
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        for option in [
            "bogus",
            "mode=sideways",
            "timeout=soon",
            "uid=root",
            "file_mode=999",
            "ro=1",
            "mode",
        ] {
            let mut args = mount(&["memory:", "/mnt", "-o", option]);
            let why = args.apply_options().expect_err(option).to_string();
            let named = option.split('=').next_back().expect("a word");
            assert!(why.contains(named) || why.contains("-o ro"), "{why}");
        }
        for (flag, value) in [
            ("--mode", "json"),
            ("--frame", "xml"),
            ("--timeout", "-1"),
            ("--max-message-size", "0"),
            ("--max-message-size", "5GiB"),
            ("--file-mode", "1777"),
        ] {
            let parsed = Cli::try_parse_from(["dnpipes", "mount", "memory:", "/mnt", flag, value]);
            assert!(parsed.is_err(), "{flag} {value}");
        }
    }

    #[test]
    fn times_and_sizes() {
        assert_eq!(timeout("0").expect("0"), None);
        assert!(timeout("5124095576030431h15s1000ms").is_err());
        assert_eq!(timeout("90").expect("90"), Some(Duration::from_secs(90)));
        assert_eq!(
            timeout("1m 30s").expect("text"),
            Some(Duration::from_secs(90))
        );
        assert_eq!(size("16MiB").expect("16MiB"), 16 << 20);
        assert_eq!(size("1").expect("1"), 1);
        // The greatest length that the frame `len` can tell, and what is said of the next.
        let most = u32::MAX as usize;
        assert_eq!(size(&most.to_string()).expect("the most"), most);
        let least = (most + 1).to_string();
        for over in ["4GiB", &least, "99999999999GiB"] {
            let refused = size(over).expect_err(over).to_string();
            assert!(refused.contains("less than 4GiB"), "{refused}");
            assert!(refused.contains("4294967295"), "{refused}");
        }
    }
}
