//! What a user of Redis may not do, and what a Redis does not know.

use std::fs;
use std::process::Command;

use crate::redis::{cli, start};
use crate::services::{Server, Services};
use crate::support::{DNPIPES, Mount, Store, finish, wait_for};

/// A Redis with a user who may do everything, and a mount of his.
fn start_with_user() -> (Services, Server, Mount) {
    let (services, server) = start(&["user pipes on >s3cret ~* &* +@all"]);
    let source = server.url.replace("//", "//pipes:s3cret@");
    let mount = Mount::new(&source, &["--allow-delete"]);
    (services, server, mount)
}

/// Gives the user rights, or takes them away.
fn allow(server: &Server, rights: &str) {
    cli(server, &format!("redis ACL SETUSER pipes '{rights}'"));
}

/// How many messages a pipe has.
fn length(server: &Server, pipe: &str) -> usize {
    let length = cli(server, &format!("redis XLEN dnpipes:{pipe}"));
    length.trim().parse().expect("a number")
}

/// Has the pipe's next producer be one more than are remembered.
fn fill_producers(server: &Server, pipe: &str) {
    cli(
        server,
        &format!(
            "key='dnpipes-known:{{dnpipes:{pipe}}}'
             read -r added length bytes largest producers last <<< \"$(redis HGET \"$key\" .count)\"
             redis HSET \"$key\" .count \"$added $length $bytes $largest 65536 $last\""
        ),
    );
}

/// Three writes of the same to one open file, of so many lines: what becomes of each.
fn write_thrice(mount: &Mount, pipe: &str, lines: usize) -> Vec<String> {
    let said = mount.python(&format!(
        "
        fd = os.open('{pipe}', os.O_WRONLY)
        print(*[why(os.write, fd, b'm\\n' * {lines}) for _ in range(3)])
        "
    ));
    said.split_whitespace().map(str::to_owned).collect()
}

/// A push that puts away the notes of so many producers needs rights that others do not.
#[test]
fn rights_that_a_push_seldom_needs_are_asked_for_before_anything_is_stored() {
    let (_services, server, mount) = start_with_user();
    let seldom = ["rename", "unlink", "hset", "hmget"];
    // Those of the transaction alone; the script does without.
    let large = ["xrevrange", "hget", "xlen"];
    for (right, small, many) in seldom
        .map(|right| (right, "EACCES", "EACCES"))
        .into_iter()
        .chain(large.map(|right| (right, "ok", "ok")))
    {
        for (lines, expected) in [(1, small), (500, many)] {
            let pipe = format!("{right}-{lines}");
            mount.out(&format!("echo first > {pipe}"));
            fill_producers(&server, &pipe);
            // A look at the pipe needs some of them, too.
            let mut writer = mount.spawn_python(&format!(
                "
                import signal
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
                fd = os.open('{pipe}', os.O_WRONLY)
                print('open', flush=True)
                for _ in range(2):
                    signal.sigwait([signal.SIGUSR1])
                    print(*[why(os.write, fd, b'm\\n' * {lines}) for _ in range(2)], flush=True)
                "
            ));
            assert_eq!(writer.line(), "open");
            let mut stored = 1;
            for (sign, expected) in [('-', expected), ('+', "ok")] {
                allow(&server, &format!("{sign}{right}"));
                writer.signal(libc::SIGUSR1);
                let said = writer.line();
                assert_eq!(
                    said,
                    format!("{expected} {expected}"),
                    "{sign}{right} {lines}"
                );
                if expected == "ok" {
                    stored += 2 * lines;
                }
                assert_eq!(length(&server, &pipe), stored, "{sign}{right} {lines}");
            }
        }
    }
}

/// What a server does not have is as what is not allowed.
#[test]
fn a_command_that_the_server_does_not_have_stores_nothing() {
    let (_services, server) = start(&["rename-command RENAME \"\""]);
    let mount = Mount::new(&server.url, &[]);
    for lines in [1, 500] {
        let pipe = format!("topic-{lines}");
        mount.out(&format!("echo first > {pipe}"));
        fill_producers(&server, &pipe);
        assert_eq!(write_thrice(&mount, &pipe, lines), ["EIO"; 3]);
        assert_eq!(length(&server, &pipe), 1);
    }
}

/// A pipe that was removed, and one that others have made again since.
#[test]
fn a_pipe_is_made_with_all_rights_or_not_at_all() {
    let (_services, server, mount) = start_with_user();
    for right in ["persist", "time", "xgroup|destroy", "xsetid"] {
        mount.out("echo first > topic; rm topic; echo first > other; rm other");
        cli(&server, "redis XADD dnpipes:other '*' data theirs");
        mount.out("stat other > /dev/null");
        allow(&server, &format!("-{right}"));
        let made = mount.python(
            "
            print(why(lambda: os.write(os.open('topic', os.O_WRONLY | os.O_CREAT), b'x\\n')))
            ",
        );
        assert_eq!(made, "EACCES\n", "{right}");
        assert_eq!(cli(&server, "redis EXISTS dnpipes:topic"), "0\n", "{right}");
        let pushed = write_thrice(&mount, "other", 1);
        let is_allowed = right != "persist";
        assert_eq!(pushed, [if is_allowed { "ok" } else { "EACCES" }; 3]);
        assert_eq!(length(&server, "other"), if is_allowed { 4 } else { 1 });
        allow(&server, &format!("+{right}"));
        mount.out("echo x > topic; rm topic; rm other");
    }
}

#[test]
fn a_reset_or_removal_is_done_with_all_rights_or_not_at_all() {
    let (_services, server, mount) = start_with_user();
    for (right, is_for_reset) in [
        ("hset", true),
        ("xpending", true),
        ("xack", true),
        ("time", true),
        ("expire", false),
        ("hset", false),
    ] {
        mount.out("seq 3 > topic");
        cli(
            &server,
            "redis XGROUP CREATE dnpipes:topic workers 0
             redis XREADGROUP GROUP workers one COUNT 1 STREAMS dnpipes:topic '>'",
        );
        allow(&server, &format!("-{right}"));
        let call = match is_for_reset {
            true => "os.truncate, 'topic', 0",
            false => "os.unlink, 'topic'",
        };
        assert_eq!(
            mount.python(&format!("\n        print(why({call}))\n")),
            "EACCES\n",
            "{right}"
        );
        assert_eq!(length(&server, "topic"), 3, "{right}");
        allow(&server, &format!("+{right}"));
        mount.out("truncate -s 0 topic; rm topic");
    }
}

#[test]
fn a_server_that_runs_no_scripts_is_told_of_at_once() {
    for (setting, said) in [
        ("rename-command EVAL \"\"", "script"),
        ("rename-command EVALSHA \"\"", "script"),
        ("rename-command XINFO \"\"", "XINFO"),
        ("user default on nopass ~* &* +@all -eval", "script"),
    ] {
        let (_services, server) = start(&[setting]);
        let output = finish(Command::new(DNPIPES).args(["ls", "--source", &server.url]));
        assert_eq!(output.status.code(), Some(1), "{setting}: {output:?}");
        let why = String::from_utf8(output.stderr).expect("text");
        assert!(why.contains(said), "{setting}: {why}");
    }
}

#[test]
fn a_password_that_is_changed_is_read_anew_for_new_connections() {
    let (_services, server) = start(&["user pipes on >one ~* &* +@all"]);
    let folder = Store::new();
    let file = folder.folder().join("password");
    fs::write(&file, "one\n").expect("a password");
    let variable = format!("DNPIPES_PASSWORD_FILE={}", file.display());
    let wrapper = ["env", "DNPIPES_USER=pipes", &variable];
    let mount = Mount::within(&wrapper, &server.url, &["--timeout", "5s"]);
    mount.out("seq 1000 > topic");
    cli(&server, "redis ACL SETUSER pipes resetpass '>two'");
    fs::write(&file, "two\n").expect("a password");
    cli(&server, "redis CLIENT KILL USER pipes");
    wait_for("the new password", || {
        mount.sh("seq 1000 > topic").status.success().then_some(())
    });
    // A file that cannot be read is no reason to forget what it said.
    fs::remove_file(&file).expect("removed");
    cli(&server, "redis CLIENT KILL USER pipes");
    mount.out("echo last > topic");
    assert_eq!(mount.out("tail -n 1 topic"), "last\n");
}

/// As in a shell's `<(…)`: who reads it again waits for whoever writes.
#[test]
fn a_password_that_can_be_read_once_is_kept() {
    let (_services, server) = start(&["user pipes on >one ~* &* +@all"]);
    let folder = Store::new();
    let fifo = folder.folder().join("password");
    folder.out("mkfifo password");
    let _writer = folder.spawn("echo one > password");
    let variable = format!("DNPIPES_PASSWORD_FILE={}", fifo.display());
    let wrapper = ["env", "DNPIPES_USER=pipes", &variable];
    let mount = Mount::within(&wrapper, &server.url, &[]);
    mount.out("echo before > topic");
    cli(&server, "redis CLIENT KILL USER pipes");
    mount.out("echo after > topic");
    assert_eq!(mount.out("cat topic"), "before\nafter\n");
}
