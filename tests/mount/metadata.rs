//! Names, attributes, listings, and what a directory of pipes refuses.

use std::collections::BTreeSet;
use std::fs;

use crate::support::{Mount, Store};

/// The pipes that the backend has are listed, also those that others made, without remounting; those that are
/// gone are not.
#[test]
fn listings_show_what_others_made() {
    let store = Store::new();
    let (one, two) = (
        Mount::new(&store.url(), &["--allow-delete"]),
        Mount::new(&store.url(), &[]),
    );
    assert_eq!(two.out("ls -A"), "");
    assert_eq!(two.python("\n        print(why(os.stat, 'a'))"), "ENOENT\n");
    one.out("echo a > a");
    assert_eq!(two.out("ls -A; cat a"), "a\na\n");
    store.out("dnpipes push b one; dnpipes push 'c d' two");
    assert_eq!(two.out("ls -A; cat b 'c d'"), "a\nb\nc d\none\ntwo\n");
    assert_eq!(one.out("ls -A; cat b 'c d'"), "a\nb\nc d\none\ntwo\n");
    store.out("dnpipes rm b");
    assert_eq!(two.out("ls -A"), "a\nc d\n");
    one.out("rm a");
    assert_eq!(two.out("ls -A; ls -l | wc -l"), "c d\n2\n");
    assert_eq!(
        two.python("\n        print(why(os.stat, 'a'), why(os.open, 'b', os.O_RDONLY))"),
        "ENOENT ENOENT\n"
    );
}

/// `touch new` creates an empty pipe; `touch old` is a no-op.
#[test]
fn touch() {
    let mount = Mount::memory(&[]);
    mount.out("touch T T2; busybox touch T3");
    assert_eq!(
        mount.out("ls; stat -c %F T; cat T@snapshot"),
        "T\nT2\nT3\nregular file\n"
    );
    mount.out("printf 'a\\nb' > T");
    let before = mount.out("stat -c '%Y %y %s' T");
    mount.out("touch T; touch -d 2001-01-01 T; busybox touch T; touch T@follow; touch -c missing");
    assert_eq!(mount.out("stat -c '%Y %y %s' T"), before);
    assert_eq!(mount.out("ls; cat T"), "T\nT2\nT3\na\nb\n");
}

/// `mkfifo new` and `mknod new p` create an empty pipe, which is a regular file from then on; where there is
/// one they are refused, and other kinds of node are EPERM.
#[test]
fn mkfifo_and_mknod() {
    let store = Store::new();
    for mount in [Mount::memory(&[]), Mount::new(&store.url(), &[])] {
        mount.out("mkfifo a; mknod b p; busybox mkfifo c");
        assert_eq!(
            mount.out("ls; stat -c %F a b c | uniq"),
            "a\nb\nc\nregular file\n"
        );
        mount.out("echo x > a; printf y > b; mkfifo d; echo z > d");
        assert_eq!(
            mount.out("cat a b d; [ -p a ] || echo file"),
            "x\ny\nz\nfile\n"
        );
        let said = mount.python(
            r#"
            import stat
            print(why(os.mkfifo, 'a'), why(os.mknod, 'a'), why(os.mkfifo, 'a@follow'))
            print(why(os.mknod, 'n', stat.S_IFREG | 0o644))
            print(why(os.mknod, 'c1', stat.S_IFCHR | 0o644, os.makedev(1, 3)), why(os.mknod, 's', stat.S_IFSOCK | 0o644))
            "#,
        );
        assert_eq!(said, "EEXIST EEXIST EEXIST\nok\nEPERM EPERM\n");
        let mut waiting = mount.spawn("cat c");
        waiting.wait_until_blocked();
        mount.out("echo w > c");
        assert_eq!(waiting.finish().stdout, b"w\n");
        assert_eq!(mount.out("ls"), "a\nb\nc\nd\nn\n");
    }
}

/// `stat` shows the bytes that a fresh open would read, and a page where that would wait.
#[test]
fn the_size_is_what_a_fresh_open_reads() {
    let store = Store::new();
    for mount in [Mount::memory(&[]), Mount::new(&store.url(), &[])] {
        let size = |names: &str| mount.out(&format!("stat -c %s {names} | paste -sd ' '"));
        mount.out("touch T");
        assert_eq!(
            size("T T@drain T@follow T@nul T@len,follow"),
            "4096 4096 4096 4096 4096\n"
        );
        assert_eq!(size("T@snapshot T@snapshot,len T@file,snapshot"), "0 0 0\n");
        mount.out("printf 'abc\\n\\nde' > T");
        assert_eq!(
            size("T T@follow T@snapshot T@nul T@file T@len"),
            "8 8 8 8 5 17\n"
        );
        for name in ["T", "T@snapshot", "T@nul", "T@file", "T@len"] {
            let read = mount.out(&format!("cat {name} | wc -c"));
            assert_eq!(size(name), read, "{name}");
        }
        mount.out("truncate -s 0 T");
        assert_eq!(size("T T@snapshot"), "4096 0\n");
        mount.out("echo x > T");
        assert_eq!(size("T T@snapshot"), "2 2\n");
    }
    let snapshot = Mount::memory(&["--mode", "snapshot"]);
    assert_eq!(snapshot.out("touch T; stat -c %s T T@drain"), "0\n4096\n");
}

/// The modification time is that of the last push.
#[test]
fn the_modification_time_is_the_last_pushs() {
    let store = Store::new();
    let memory = Mount::memory(&[]);
    let (one, two) = (Mount::new(&store.url(), &[]), Mount::new(&store.url(), &[]));
    for (writer, reader) in [(&memory, &memory), (&one, &two)] {
        let said = writer.python(&format!(
            r#"
            import time
            last = 0
            for number in range(5):
                before = time.time()
                with open('T', 'w') as out:
                    out.write('x\n')
                after = time.time()
                open('T').read()
                seen = os.stat('{}').st_mtime
                # Stores keep microseconds.
                assert before - 1e-5 <= seen <= after, (before, seen, after)
                assert seen > last
                last = seen
                while time.time() < after + 0.001:
                    pass
            print('ok')
            "#,
            reader.file("T").display()
        ));
        assert_eq!(said, "ok\n");
    }
}

/// uid, gid and mode come from the mount's options; the directory has the search bits that go with them.
#[test]
fn owner_and_mode_are_the_mounts() {
    let flags = ["--uid", "1234", "--gid", "2345", "--file-mode", "640"];
    let options = ["-o", "uid=1234,gid=2345", "-o", "file_mode=640"];
    for flags in [&flags[..], &options[..]] {
        let mount = Mount::memory(flags);
        let shown = mount.out("umask 077; touch T; mkfifo U; stat -c '%u %g %a %h' T U T@follow; stat -c '%u %g %a %F' .");
        let file = "1234 2345 640 1\n";
        assert_eq!(
            shown,
            format!("{file}{file}{file}1234 2345 750 directory\n")
        );
    }
    let mount = Mount::memory(&[]);
    assert_eq!(
        mount.out("touch T; stat -c '%u %g %a' T; stat -c %a ."),
        "0 0 644\n755\n"
    );
}

/// The permissions hold for other users: `--allow-other` lets them in as far as the mode does.
#[test]
fn permissions_hold_for_other_users() {
    let mount = Mount::memory(&["--allow-other"]);
    mount.out("echo a > T; chmod 755 ..; ls -ld .. > /dev/null");
    let other = "setpriv --reuid=65534 --regid=65534 --clear-groups";
    assert_eq!(mount.out(&format!("{other} cat T")), "a\n");
    for refused in ["echo b > T", "truncate -s 0 T", "touch new"] {
        let output = mount.sh(&format!("LC_ALL=C {other} sh -c '{refused}'"));
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && errors.contains("ermission denied"),
            "{errors}"
        );
    }
    assert_eq!(mount.out("ls; cat T"), "T\na\n");
    let private = Mount::memory(&[]);
    private.out("echo a > T; chmod 755 ..");
    assert!(!private.sh(&format!("{other} cat T")).status.success());
}

/// `rm` is EPERM, unless mounted with `--allow-delete`: then the pipe is gone for everyone.
#[test]
fn rm() {
    let store = Store::new();
    let (plain, deleting) = (
        Mount::new(&store.url(), &[]),
        Mount::new(&store.url(), &["--allow-delete"]),
    );
    plain.out("echo a > T; echo b > U");
    let said = plain.python(
        r#"
        print(why(os.unlink, 'T'), why(os.unlink, 'T@follow'), why(os.unlink, 'missing'), why(os.rmdir, 'T'))
        "#,
    );
    assert_eq!(said, "EPERM EPERM ENOENT ENOTDIR\n");
    assert!(plain.log().contains("--allow-delete"), "{}", plain.log());
    assert_eq!(plain.out("cat T"), "a\n");
    let mut follower = plain.spawn("head -n 2 T@follow");
    follower.wait_until_blocked();
    let said = deleting.python("\n        print(why(os.unlink, 'missing'), why(os.unlink, 'T@follow'), why(os.unlink, 'T'))");
    assert_eq!(said, "ENOENT EPERM ok\n");
    for mount in [&plain, &deleting] {
        assert_eq!(mount.out("ls"), "U\n");
        assert_eq!(
            mount.python("\n        print(why(os.stat, 'T'))"),
            "ENOENT\n"
        );
    }
    assert_eq!(store.out("dnpipes ls"), "U\n");
    deleting.out("echo again > T");
    assert_eq!(plain.out("cat T"), "again\n");
    assert_eq!(follower.finish().stdout, b"a\nagain\n");
}

/// `mv`, `mkdir`, `ln`, `ln -s`, chmod and chown are EPERM and change nothing.
#[test]
fn what_a_directory_of_pipes_refuses() {
    let mount = Mount::memory(&["--allow-delete"]);
    mount.out("echo a > T; echo b > U");
    let said = mount.python(
        r#"
        fd = os.open('T', os.O_RDWR)
        print(why(os.rename, 'T', 'new'), why(os.rename, 'T', 'U'), why(os.replace, 'U', 'T'))
        print(why(os.mkdir, 'new'), why(os.link, 'T', 'new'), why(os.symlink, 'T', 'new'))
        print(why(os.chmod, 'T', 0o600), why(os.fchmod, fd, 0o600), why(os.chmod, '.', 0o700))
        print(why(os.chown, 'T', 1, 1), why(os.fchown, fd, 1, -1), why(os.chown, '.', 1, 1))
        print(why(os.setxattr, 'T', 'user.x', b'1'), why(os.removexattr, 'T', 'user.dnpipes.count'))
        "#,
    );
    let expected = "EPERM EPERM EPERM\nEPERM EPERM EPERM\nEPERM EPERM EPERM\nEPERM EPERM EPERM\nENOTSUP ENOTSUP\n";
    assert_eq!(said, expected);
    let shown = mount.out("ls -A; stat -c '%a %u' T .; cat T U");
    assert_eq!(shown, "T\nU\n644 0\n755 0\na\nb\n");
    for program in [
        "mv T new",
        "mkdir new",
        "ln T new",
        "ln -s T new",
        "chmod 600 T",
        "chown 1 T",
    ] {
        let output = mount.sh(&format!("LC_ALL=C {program}"));
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && errors.contains("Operation not permitted"),
            "{program}: {errors}"
        );
    }
}

/// The extended attributes `user.dnpipes.{count,bytes,first,last,backend,frame}` are readable with getfattr.
#[test]
fn extended_attributes() {
    let store = Store::new();
    for (source, backend) in [("memory:", "memory"), (&store.url(), "sqlite")] {
        let mount = Mount::new(source, &[]);
        mount.out("printf 'abc\\nde\\nf\\n' > T");
        let listed = mount.out("getfattr -d T");
        for line in [
            "user.dnpipes.count=\"3\"",
            "user.dnpipes.bytes=\"6\"",
            "user.dnpipes.frame=\"line\"",
            &format!("user.dnpipes.backend=\"{backend}\""),
        ] {
            assert!(
                listed.lines().any(|shown| shown == line),
                "{line}: {listed}"
            );
        }
        let get =
            |name: &str| mount.out(&format!("getfattr --only-values -n user.dnpipes.{name} T"));
        let (first, last) = (get("first"), get("last"));
        assert!(!first.is_empty() && first != last, "{first} {last}");
        assert_eq!(
            mount.out("getfattr --only-values -n user.dnpipes.frame T@nul"),
            "nul"
        );
        mount.out("truncate -s 0 T; echo g > T");
        assert_eq!(
            (get("count"), get("bytes")),
            ("1".to_owned(), "1".to_owned())
        );
        assert!(get("first") != first && get("first") == get("last"));
        let said = mount.python(
            r#"
            os.truncate('T', 0)
            print(*sorted(os.listxattr('T')))
            print(os.getxattr('T', 'user.dnpipes.count'), why(os.getxattr, 'T', 'user.dnpipes.first'))
            print(why(os.getxattr, 'T', 'user.other'), why(os.getxattr, '.', 'user.dnpipes.count'), os.listxattr('.'))
            "#,
        );
        let names =
            ["backend", "bytes", "count", "frame"].map(|name| format!("user.dnpipes.{name}"));
        assert_eq!(
            said,
            format!("{}\nb'0' ENODATA\nENODATA ENODATA []\n", names.join(" "))
        );
    }
}

/// statfs is non-zero, so `df` shows the mount; it and mount(8) name what it is.
#[test]
fn df_and_findmnt_show_the_mount() {
    let store = Store::new();
    let mount = Mount::new(&store.url(), &[]);
    let dir = mount.dir().display();
    let shown = mount.out(&format!(
        "df --output=source,fstype,size,avail,itotal {dir} | tail -n 1"
    ));
    let words: Vec<&str> = shown.split_whitespace().collect();
    assert_eq!(
        words[..2],
        [store.url().as_str(), "fuse.dnpipes"],
        "{shown}"
    );
    for number in &words[2..] {
        assert!(number.parse::<u64>().expect("a number") > 0, "{shown}");
    }
    // Other tests' dead mounts make df complain, but not of this one.
    let all = String::from_utf8(mount.sh("df").stdout).expect("text");
    assert!(all.contains(&dir.to_string()), "{all}");
    assert_eq!(
        mount.out(&format!("findmnt -n -o FSTYPE {dir}")),
        "fuse.dnpipes\n"
    );
}

/// Selectors are looked up but never listed, and are the same pipe as the plain name.
#[test]
fn selectors_are_not_listed() {
    let mount = Mount::memory(&[]);
    mount.out("echo a > T; echo b > T@nul; cat T@snapshot T@len > /dev/null; : > U@follow,file");
    assert_eq!(
        mount.out("ls -A; find . -type f | sort"),
        "T\nU\n./T\n./U\n"
    );
    assert_eq!(mount.out("exec 3< T@follow; ls -A; echo *"), "T\nU\nT U\n");
    assert_eq!(
        mount.python("\n        print(why(os.stat, 'new@follow'))"),
        "ENOENT\n"
    );
}

/// Hundreds of pipes are listed, each once, with their attributes, here and elsewhere.
#[test]
fn many_pipes_are_listed() {
    let store = Store::new();
    let (one, two) = (Mount::new(&store.url(), &[]), Mount::new(&store.url(), &[]));
    let names: BTreeSet<String> = (0..500)
        .map(|number| format!("pipe with a longish name {number}"))
        .collect();
    one.python(
        r#"
        for number in range(500):
            os.close(os.open('pipe with a longish name %d' % number, os.O_WRONLY | os.O_CREAT))
        "#,
    );
    for mount in [&one, &two] {
        let listed = mount.out("ls -A");
        assert_eq!(listed.lines().count(), 500);
        assert_eq!(
            listed.lines().map(str::to_owned).collect::<BTreeSet<_>>(),
            names
        );
        assert_eq!(
            mount.out("find . -type f -size 4096c | wc -l; ls -l | grep -c '^-rw-r--r--'"),
            "500\n500\n"
        );
        let walked = names_in(mount);
        assert_eq!(walked, names);
    }
}

/// `-o` gives the flags under mount(8)'s names, and overrides them.
#[test]
fn mount_options() {
    let mount = Mount::memory(&[
        "--mode",
        "follow",
        "-o",
        "rw,noatime,mode=snapshot,frame=nul",
        "-o",
        "max_message_size=5,allow_delete,nofail",
    ]);
    assert_eq!(mount.out("touch T; cat T"), "");
    mount.out("printf 'a\\nb\\0c\\0' > T");
    assert_eq!(mount.bytes("T"), b"a\nb\0c\0");
    let said = mount.python("\n        print(why(os.write, os.open('T', os.O_WRONLY), b'123456'))");
    assert_eq!(said, "EMSGSIZE\n");
    assert_eq!(mount.out("rm T; ls"), "");
}

/// A name is 1 to 200 bytes of UTF-8, and is kept as it is.
#[test]
fn names_are_kept_as_they_are() {
    let store = Store::new();
    let longest = "x".repeat(200);
    let wide = "ü".repeat(100);
    let names = [
        "a",
        "with space",
        "ünïcode-π",
        "日本語",
        "a.b:c~$%#",
        "-dash",
        "quote'\"`$(x)",
        "*?[a]",
        "back\\slash",
        "%2F",
        "a,b=c",
        "🙂",
        "trailing.",
        "e\u{301}",
        "\u{e9}",
        &longest,
        &wide,
    ];
    let (one, two) = (Mount::new(&store.url(), &[]), Mount::new(&store.url(), &[]));
    for name in names {
        fs::write(one.file(name), format!("{name}\n")).expect(name);
        let read = fs::read_to_string(two.file(&format!("{name}@snapshot,nul"))).expect(name);
        assert_eq!(read, format!("{name}\0"));
        let pulled = store.run(&["pull", "--", name]);
        assert_eq!(String::from_utf8_lossy(&pulled.stdout), format!("{name}\n"));
    }
    let expected: BTreeSet<String> = names.map(str::to_owned).into();
    for mount in [&one, &two] {
        let listed = names_in(mount);
        assert_eq!(listed, expected);
    }
}

/// What reads a directory from its beginning once more, as after rewinddir(3), sees what is there then.
#[test]
fn a_directory_that_is_read_again_shows_what_is_new() {
    let mount = Mount::memory(&[]);
    let said = mount.python(
        "
        folder = os.open('.', os.O_RDONLY)
        print(sorted(os.listdir(folder)))
        for name in ('one', 'two'):
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT))
            print(sorted(os.listdir(folder)))
        ",
    );
    assert_eq!(said, "[]\n['one']\n['one', 'two']\n");
}

/// What readdir(3) lists.
fn names_in(mount: &Mount) -> BTreeSet<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| {
        let name = entry.expect("an entry").file_name();
        name.into_string().expect("UTF-8")
    };
    let entries = fs::read_dir(mount.dir()).expect("the directory");
    entries.map(name).collect()
}
