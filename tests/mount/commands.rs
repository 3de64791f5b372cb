//! The commands, which use a store without a mount.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use crate::gateway::free_port;
use crate::support::{DNPIPES, Mount, Store, finish, wait_for};

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// push, pull and reset: what is pushed is available to any participant until a reset; pull removes nothing.
#[test]
fn push_pull_and_reset() {
    let store = Store::new();
    assert_eq!(
        store.out("dnpipes push T one; dnpipes push T two ''; dnpipes pull T"),
        "one\ntwo\n\n"
    );
    assert_eq!(
        store.out("dnpipes pull T; dnpipes pull T | wc -l"),
        "one\ntwo\n\n3\n"
    );
    assert_eq!(
        store.out("dnpipes push T -- -n --frame; dnpipes pull T | tail -n 2"),
        "-n\n--frame\n"
    );
    assert_eq!(
        store.out("dnpipes push T $'a\\nb\\xff'; dnpipes pull T | tail -n 2 | od -An -c"),
        "   a  \\n   b 377  \\n\n"
    );
    assert_eq!(
        store.out("dnpipes reset T; dnpipes pull T@snapshot; dnpipes push T three; dnpipes pull T"),
        "three\n"
    );
}

/// A push by the command is there for a mount, and the other way round, also for who waits.
#[test]
fn commands_and_mounts_share_a_store() {
    let store = Store::new();
    let mount = Mount::new(&store.url(), &[]);
    mount.out("touch T");
    let mut reader = mount.spawn("cat T");
    reader.wait_until_blocked();
    store.out("dnpipes push T one");
    assert_eq!(reader.finish().stdout, b"one\n");
    mount.out("echo two > T");
    assert_eq!(store.out("dnpipes pull T"), "one\ntwo\n");
    store.out("dnpipes reset T");
    assert_eq!(mount.out("cat T@snapshot"), "");
}

/// Standard input is pushed in each framing: by line, NUL, length, or as one message.
#[test]
fn push_reads_standard_input_in_each_framing() {
    let store = Store::new();
    store.out("printf 'a\\n\\nb\\r\\nc' | dnpipes push lines");
    assert_eq!(
        store.out("dnpipes pull --frame nul lines | tr '\\0' '!'"),
        "a!!b\r!c!"
    );
    for (push, pull) in [
        ("--frame nul N", "--frame nul N"),
        ("N@nul", "N@nul"),
        ("--frame line N@nul", "--frame len N@nul"),
    ] {
        store.out(&format!("printf 'a\\nb\\0\\0c' | dnpipes push {push}"));
        assert_eq!(
            store.out(&format!(
                "dnpipes pull {pull} | tr '\\0' '!'; dnpipes reset N"
            )),
            "a\nb!!c!"
        );
    }
    let bytes: Vec<u8> = (0..600_000_u32).map(|n| (n ^ (n >> 8)) as u8).collect();
    fs::write(store.folder().join("photo"), &bytes).expect("a file");
    store.out("dnpipes push --frame file F < photo; dnpipes push F@file < photo");
    assert_eq!(store.out("dnpipes pull --frame file -n 1 F | cmp - photo; dnpipes pull F@file | cmp - <(cat photo photo)"), "");
    store.out("dnpipes pull --frame len F > framed; dnpipes push --frame len G < framed; dnpipes pull G@len | cmp - framed");
    assert_eq!(
        store.out("dnpipes pull G@file | cmp - <(cat photo photo); wc -c < framed"),
        "1200008\n"
    );
    let cut = store.sh("head -c 1000 framed | dnpipes push --frame len H");
    assert_eq!(code(&cut), Some(1));
    assert!(errors(&cut).contains("cut"), "{}", errors(&cut));
    assert_eq!(
        store.out(": | dnpipes push E; dnpipes ls"),
        "F\nG\nN\nlines\n"
    );
}

#[test]
fn help_is_payload() {
    for command in ["mount", "push", "pull", "serve"] {
        for args in [[command, "--help"], ["help", command]] {
            let output = finish(Command::new(DNPIPES).args(args));
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(
                output.status.success() && output.stderr.is_empty(),
                "{output:?}"
            );
            assert!(
                said.contains("http[s]://host:port/") || command == "serve",
                "{said}"
            );
        }
    }
}

/// A line from standard input is pushed when it is there, not at the end.
#[test]
fn push_does_not_wait_for_the_end_of_standard_input() {
    let store = Store::new();
    let mut push =
        store.spawn("mkfifo in; exec 3<>in; echo early >&3; dnpipes push T < in 3>&-; :");
    assert_eq!(store.out("dnpipes pull T@follow -n 1"), "early\n");
    assert!(push.is_running());
}

/// Messages among the arguments are pushed together, and standard input is left alone.
#[test]
fn push_with_a_message_does_not_read_standard_input() {
    let store = Store::new();
    store.out("exec 3<> <(:); dnpipes push T one two <&3");
    assert_eq!(
        store.out("printf 'for cat\\n' | { dnpipes push T three; cat; }"),
        "for cat\n"
    );
    assert_eq!(store.out("dnpipes pull T"), "one\ntwo\nthree\n");
}

/// `pull -n` stops after so many messages, and waits for them where the mode waits.
#[test]
fn pull_stops_after_a_number_of_messages() {
    let store = Store::new();
    store.out("printf '%s\\n' a b c d | dnpipes push T");
    assert_eq!(
        store.out("dnpipes pull -n 2 T; dnpipes pull -n 9 T; dnpipes pull -n 0 T"),
        "a\nb\na\nb\nc\nd\n"
    );
    assert_eq!(
        store.out("dnpipes pull -n 4 T@follow | tail -n 1; dnpipes pull -n 1 T@snapshot"),
        "d\na\n"
    );
}

/// `pull --timeout` has exit code 3 when no message came at all, and 0 when one did.
#[test]
fn pull_times_out() {
    let store = Store::new();
    store.out("dnpipes push T a; dnpipes push E x; dnpipes reset E");
    for args in [
        "--timeout 0 E",
        "--timeout 20ms E",
        "--timeout 0 E@follow",
        "--timeout 5s E@snapshot",
        "--timeout 0 -n 1 E",
    ] {
        let output = store.sh(&format!("dnpipes pull {args}"));
        assert_eq!(
            (code(&output), errors(&output)),
            (Some(3), String::new()),
            "{args}"
        );
        assert!(output.stdout.is_empty());
    }
    for args in [
        "--timeout 0 T",
        "--timeout 20ms T@follow",
        "--timeout 0 -n 9 T@follow",
        "--timeout 30s T",
    ] {
        assert_eq!(store.out(&format!("dnpipes pull {args}")), "a\n", "{args}");
    }
}

/// A store that is away is waited for no longer than a message would be.
#[test]
fn a_pull_that_does_not_wait_long_does_not_wait_long_for_the_store() {
    let nobody = format!("redis://127.0.0.1:{}/", free_port());
    for timeout in ["0", "1s"] {
        let mut pull = Command::new(DNPIPES);
        pull.args(["pull", "--source", &nobody, "--timeout", timeout, "T"]);
        let output = finish(&mut pull);
        assert_eq!(code(&output), Some(1));
        assert!(
            errors(&output).contains("no answer within 2s"),
            "{output:?}"
        );
    }
}

/// `pull topic@follow` prints what is there at once, goes on waiting, and is woken by a push.
#[test]
fn a_following_pull_is_woken_by_a_push() {
    let store = Store::new();
    store.out("dnpipes push T one");
    let mut pull = store.spawn("dnpipes pull T@follow > out");
    let out = store.folder().join("out");
    let mut expected = "one\n".to_owned();
    for number in 0..5 {
        wait_for("what was pushed", || {
            (fs::read_to_string(&out).ok()? == expected).then_some(())
        });
        assert!(pull.is_running());
        store.out(&format!("dnpipes push T {number}"));
        expected += &format!("{number}\n");
    }
    wait_for("the last", || {
        (fs::read_to_string(&out).ok()? == expected).then_some(())
    });
}

/// A pull of an empty pipe waits for its first message, and ends after it.
#[test]
fn a_pull_of_an_empty_pipe_waits() {
    let store = Store::new();
    store.out("dnpipes push T x; dnpipes reset T");
    let pull = store.spawn("echo started; dnpipes pull T");
    store.out("dnpipes push T one");
    assert_eq!(pull.finish().stdout, b"started\none\n");
}

/// A command line that makes no sense is exit code 2, and says on standard error why.
#[test]
fn usage_errors_are_exit_code_2() {
    let store = Store::new();
    for args in [
        &[][..],
        &["bogus"],
        &["push"],
        &["pull"],
        &["pull", "--bogus", "T"],
        &["pull", "T@bogus"],
        &["pull", "T@follow,drain"],
        &["pull", ".hidden"],
        &["pull", "-n", "many", "T"],
        &["pull", "--timeout", "soon", "T"],
        &["push", "--frame", "xml", "T"],
        &["push", "T@follow", "x"],
        &["reset", "T@follow"],
        &["reset", "a/b"],
        &["rm", ""],
        &["ls", "T"],
        &["ls", "--source", "bogus:"],
        &["ls", "--source", "sqlite:"],
        &["ls", "--source", "sqlite:/x.db?durability=none"],
    ] {
        let output = store.run(args);
        assert_eq!(code(&output), Some(2), "{args:?}: {}", errors(&output));
        assert!(
            output.stdout.is_empty() && !output.stderr.is_empty(),
            "{args:?}"
        );
    }
}

/// What fails is exit code 1, and says on standard error what failed.
#[test]
fn failures_are_exit_code_1() {
    let store = Store::new();
    fs::write(
        store.folder().join("text"),
        "not a database, for sure\n".repeat(100),
    )
    .expect("a file");
    let missing = format!("sqlite:{}/no/such/folder.db", store.folder().display());
    let text = format!("sqlite:{}/text", store.folder().display());
    for (args, word) in [
        (&["reset", "missing"][..], "missing"),
        (&["rm", "missing"], "missing"),
        (&["ls", "--source", &missing], "no/such"),
        (&["push", "--source", &text, "T", "x"], "text"),
        (&["ls", "--source", "memory:"], "memory:"),
    ] {
        let output = store.run(args);
        assert_eq!(code(&output), Some(1), "{args:?}: {}", errors(&output));
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(
            errors(&output).contains(word),
            "{args:?}: {}",
            errors(&output)
        );
    }
    assert_eq!(store.out("dnpipes ls"), "");
}

/// Where nobody can be told, as on a full disk, the exit code is the same.
#[test]
fn a_failure_that_cannot_be_told_is_exit_code_1() {
    let store = Store::new();
    let mut bash = Command::new("bash");
    bash.arg("-c").arg(format!(
        "{DNPIPES} rm --source {} nosuch 2> /dev/full",
        store.url()
    ));
    assert_eq!(code(&finish(&mut bash)), Some(1));
}

/// A level that is none silences nothing.
#[test]
fn a_log_that_nobody_can_mean_is_refused() {
    let store = Store::new();
    for level in ["wran", "info,dnpipes=loud", "dnpipes"] {
        let output = store.sh(&format!("DNPIPES_LOG={level} dnpipes ls"));
        assert_eq!(code(&output), Some(2), "{level}");
        let why = errors(&output);
        assert!(
            why.contains("DNPIPES_LOG") && why.contains("module=level"),
            "{why}"
        );
    }
    for level in ["", "info", "error,dnpipes=debug", "warn/text"] {
        let output = store.sh(&format!("DNPIPES_LOG={level} dnpipes ls"));
        assert_eq!(code(&output), Some(0), "{level}");
    }
}

/// A line that no server would take is refused before all of it is gathered, and before a server is asked.
#[test]
fn an_endless_line_for_a_server_that_is_away_is_refused() {
    let store = Store::new();
    let push = "dnpipes push --source nats://127.0.0.1:9/ T";
    let output = store.sh(&format!("ulimit -v 2000000; {push} < /dev/zero"));
    assert_eq!(code(&output), Some(1), "{output:?}");
    assert!(errors(&output).contains("limit"), "{}", errors(&output));
}

/// Standard output holds the payload and nothing else, whatever is logged.
#[test]
fn standard_output_is_payload_only() {
    let store = Store::new();
    for script in [
        "dnpipes push T a b",
        "echo c | dnpipes push T",
        "dnpipes pull --timeout 0 E",
        "dnpipes reset E",
        "dnpipes rm E",
    ] {
        let output = store.sh(&format!("export DNPIPES_LOG=trace; {script}"));
        assert!(output.stdout.is_empty(), "{script}");
    }
    let output = store.sh("DNPIPES_LOG=trace dnpipes pull T");
    assert_eq!(output.stdout, b"a\nb\nc\n");
    let help = store.run(&["--help"]);
    assert_eq!((code(&help), help.stderr.len()), (Some(0), 0));
    assert!(String::from_utf8_lossy(&help.stdout).contains("pull"));
}

/// `pull | head -1` ends quietly.
#[test]
fn a_closed_output_ends_quietly() {
    let store = Store::new();
    store.out("seq 200000 | dnpipes push T");
    assert_eq!(
        store.out("dnpipes pull T | head -1; echo ${PIPESTATUS[0]}"),
        "1\n0\n"
    );
    assert_eq!(
        store.out("dnpipes pull T@follow | head -1; echo ${PIPESTATUS[0]}"),
        "1\n0\n"
    );
    let full = store.sh("dnpipes pull T > /dev/full");
    assert_eq!(code(&full), Some(1));
    assert!(
        errors(&full).contains("standard output"),
        "{}",
        errors(&full)
    );
}

/// `ls` lists the pipes by name; `ls -l` with their messages, bytes and the time of the last push; `rm` removes
/// one for everyone.
#[test]
fn ls_and_rm() {
    let store = Store::new();
    assert_eq!(store.out("dnpipes ls; dnpipes ls -l"), "");
    store.out(
        "dnpipes push b two; dnpipes push a one ''; dnpipes push 'c d' x; dnpipes reset 'c d'",
    );
    assert_eq!(store.out("dnpipes ls"), "a\nb\nc d\n");
    let now = store.out("date -u +%Y-%m-%dT");
    let long = store.out("dnpipes ls -l");
    let rows: Vec<Vec<&str>> = long
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let counts: Vec<_> = rows.iter().map(|row| (row[0], row[1], row[3])).collect();
    assert_eq!(
        counts,
        [("2", "3", "a"), ("1", "3", "b"), ("0", "0", "c")],
        "{long}"
    );
    for row in rows {
        assert!(
            row[2].starts_with(now.trim()) && row[2].ends_with('Z'),
            "{long}"
        );
    }
    store.out("dnpipes rm a");
    assert_eq!(store.out("dnpipes ls"), "b\nc d\n");
    assert_eq!(code(&store.run(&["pull", "--timeout", "0", "a"])), Some(3));
}

/// Without a source, a user who is not root has a store of his own under XDG_DATA_HOME, or HOME; it is made on
/// first use, for him alone.
#[test]
fn the_default_store_is_the_users() {
    let folder = Store::new();
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
    };
    mode(folder.folder(), 0o777);
    let program = folder.folder().join("dnpipes");
    fs::copy(DNPIPES, &program).expect("a copy");
    mode(&program, 0o755);
    let user = |environment: &str, args: &str| {
        folder.sh(&format!(
            "setpriv --reuid=65534 --regid=65534 --clear-groups env -i {environment} \"$PWD/dnpipes\" {args}"
        ))
    };
    for (environment, made) in [
        (
            "XDG_DATA_HOME=\"$PWD/data\" HOME=\"$PWD/elsewhere\"",
            "data/dnpipes",
        ),
        ("HOME=\"$PWD/home\"", "home/.local/share/dnpipes"),
        (
            "XDG_DATA_HOME=relative HOME=\"$PWD/other\"",
            "other/.local/share/dnpipes",
        ),
    ] {
        let pushed = user(environment, "push T mine");
        assert!(pushed.status.success(), "{}", errors(&pushed));
        assert_eq!(user(environment, "pull T").stdout, b"mine\n");
        let made = folder.folder().join(made);
        assert!(made.join("pipes.db").is_file(), "{environment}");
        let bits = fs::metadata(&made)
            .expect("the folder")
            .permissions()
            .mode();
        assert_eq!(bits & 0o777, 0o700);
        let bits = fs::metadata(made.join("pipes.db"))
            .expect("the store")
            .permissions()
            .mode();
        assert_eq!(bits & 0o077, 0);
    }
    let nowhere = user("", "push T x");
    assert_eq!(code(&nowhere), Some(1));
    assert!(
        errors(&nowhere).contains("XDG_DATA_HOME"),
        "{}",
        errors(&nowhere)
    );
    assert!(!folder.folder().join("elsewhere").exists());
}
